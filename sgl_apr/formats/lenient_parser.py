"""Finished text of any model, whatever it is worth: a trajectory of what can be read, and a list of what is wrong."""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

from lark import Token, Tree, UnexpectedInput

from sgl_apr.errors import TraceError
from sgl_apr.formats.dialects import Dialect, dialect, dialect_names
from sgl_apr.formats.error_recovery import ErrorRecoveringParser, Repair
from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar
from sgl_apr.formats.graph_builder import build_spans
from sgl_apr.formats.segmenter import Segment, iter_segments
from sgl_apr.tokenizer import Tokenizer, split_ids
from sgl_apr.trajectory.trajectory import Trajectory

FALLBACK = "threadweaver"  # what a text without any tag is read as


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that is wrong. `offset` counts characters from 0, `line` and `column` from 1."""

    name: str
    offset: int
    line: int
    column: int
    found: str
    expected: str

    def __str__(self) -> str:
        what = f"found {self.found!r}" if self.found else "nothing there"
        return f"line {self.line}, column {self.column}: {self.name}: {what}, expected {self.expected}"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text came to: `trajectory` holds all of it, character for character."""

    trajectory: Trajectory
    defects: tuple[Defect, ...] = ()

    @property
    def is_valid(self) -> bool:
        """Whether strict parsing accepts it."""
        return not self.defects


def read(
    text: str,
    dialect: Dialect | str | None = None,
    *,
    prompt: str = "",
    tokenizer: Tokenizer | None = None,
) -> Reading:
    """Read a reply, however broken: never raises for a text, in time linear in its length.

    Without a `dialect` it is the one whose tags the text has (`detect`). Tags in `prompt` are not structure.
    What is missing is assumed where that lets the rest be read, and tags in the wrong place count as text;
    either is a defect.
    """
    known = _dialect(dialect or detect(text) or FALLBACK)
    with _gc_paused():
        try:
            reading = Reading(known.parse(text, tokenizer))
        except TraceError:
            reading = _recovered(text, known, tokenizer)
    if not prompt:
        return reading
    ids = tuple(tokenizer.encode(prompt, first=True)) if tokenizer else None
    return Reading(reading.trajectory.with_prompt(prompt, ids), reading.defects)


def detect(text: str) -> str | None:
    """The name of the dialect whose tags a text has, None if it has none.

    The most of its tags decide, then whether it parses, then how few of the dialect's own tags are absent.
    """
    counts = {name: [text.count(m) for m in dialect(name).grammar.tag_literals] for name in dialect_names()}
    most = max(map(sum, counts.values()))
    tied = [name for name, found in counts.items() if sum(found) == most > 0]
    if len(tied) < 2:
        return tied[0] if tied else None
    return max(
        tied,
        key=lambda name: (dialect(name).is_valid(text), sum(map(bool, counts[name])) / len(counts[name])),
    )


@contextmanager
def _gc_paused() -> Iterator[None]:
    """A megabyte makes a million objects and no cycles: looking for some would take as long as reading."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _dialect(which: Dialect | str) -> Dialect:
    return dialect(which) if isinstance(which, str) else which


def _recovered(text: str, known: Dialect, tokenizer: Tokenizer | None) -> Reading:
    recovery = ErrorRecoveringParser(known.grammar, text, known.max_depth)
    recovery.run()
    lines = [0, *(i + 1 for i, c in enumerate(text) if c == "\n")]
    found: dict[tuple[str, int], Defect] = {}

    def note(name: str, start: int, end: int, expected: str) -> None:
        line = bisect_right(lines, start)
        piece = text[start : min(end, start + 40)]
        found.setdefault(
            (name, start), Defect(name, start, line, start - lines[line - 1] + 1, piece, expected)
        )

    roles = _roles(known)
    for repair in recovery.repairs:
        for name, expected in _named(repair, recovery, roles):
            note(name, repair.at, repair.end, expected)
    try:
        pieces = _contiguous(_segments(known.grammar, recovery.tokens), len(text))
    except UnexpectedInput:  # a grammar of which nothing short completes a reply
        note("beyond repair", 0, len(text), f"a reply of {known.name}")
        pieces = _contiguous([], len(text))
    ids: list[tuple[int, ...] | None] = [None] * len(pieces)
    if tokenizer is not None:
        ids = list(split_ids(tokenizer.encode(text), text, [p.end for p in pieces], tokenizer))
    spans = build_spans(pieces, text, ids, known.structure(note))
    if not found:  # the grammar's parser and this one disagree: strictness decides
        note("not valid", 0, 0, f"a reply of {known.name}")
    defects = tuple(sorted(found.values(), key=lambda d: d.offset))
    return Reading(Trajectory(tuple(spans), known.name), defects)


def _segments(grammar: Grammar, tokens: list[Token]) -> list[Segment]:
    interactive = grammar.parser("trace").parse_interactive("")
    for token in tokens:
        interactive.feed_token(token)
    tree: Tree[Token] = interactive.feed_eof()
    return list(iter_segments(grammar, tree, keep_empty=True))


def _contiguous(found: list[Segment], size: int) -> list[Segment]:
    """Segments that cover the whole text: what lies between two belongs to the first."""
    if not found or found[0].start > 0:
        found = [Segment("text", 0, found[0].start if found else size), *found]
    ends = [s.start for s in found[1:]] + [size]
    return [replace(s, end=max(end, s.start)) for s, end in zip(found, ends, strict=True)]


@lru_cache(maxsize=64)
def _roles(known: Dialect) -> dict[str, str]:
    """What it means that a tag is missing, by the tag."""
    grammar = known.grammar
    closing = grammar.closing_literal("body") or grammar.closing_literal("body", "1")
    places = [
        ("fork", "unopened block", "unclosed list of outlines"),
        ("outline", "missing outline", "unclosed outline"),
        ("header", "unopened branch", "unclosed branch"),
        ("lead", "missing results", "missing results"),
        ("result", "missing result", "unclosed result"),
        ("failure", "missing result", "unclosed result"),
        ("wait", "missing join", "missing join"),
        ("conclusion", "missing conclusion", "unclosed conclusion"),
        ("tail", "block never closed", "block never closed"),
        ("close", "missing conclusion", "block never closed"),
    ]
    found = {mark: "unclosed branch" for mark in grammar.tag_literals if closing.startswith(mark)}
    for rule, opening, ending in places:
        for which, name in (
            (grammar.opening_literal(rule), opening),
            (grammar.closing_literal(rule), ending),
        ):
            for mark in grammar.tag_literals:
                if which.startswith(mark):
                    found.setdefault(mark, name)
        for mark in grammar.tags_in_rule(rule):
            found.setdefault(mark, ending)
    return found


def _named(repair: Repair, recovery: ErrorRecoveringParser, roles: dict[str, str]) -> list[tuple[str, str]]:
    """What a repair says of the text: names with what was expected."""
    if not repair.inserted:
        return [_misplaced(repair, recovery, roles)]
    tags = [recovery.fixed[name] for name in repair.inserted if name in recovery.tags]
    names = dict.fromkeys((roles.get(tag, "missing tag"), tag) for tag in tags)
    if {"unopened branch", "unclosed branch"} <= {name for name, _ in names}:
        names = dict.fromkeys(("missing branch" if "branch" in n else n, tag) for n, tag in names)
    if names:
        return [(name, repr(tag)) for name, tag in names]
    if NUMBER in repair.inserted:
        return [("missing number", "a number")]
    if TEXT in repair.inserted:
        return [("missing text", "free text")]
    return [("missing white space", " ".join(repr(recovery.fixed.get(n, n)) for n in repair.inserted))]


def _misplaced(repair: Repair, recovery: ErrorRecoveringParser, roles: dict[str, str]) -> tuple[str, str]:
    role = next((r for mark, r in roles.items() if recovery.text.startswith(mark, repair.at)), None)
    if role is None:
        return "text where none belongs", "a tag"
    if "conclusion" in role and repair.in_branch:
        return "conclusion inside a branch", "the end of the branch"
    if role == "unclosed branch":
        return "unopened branch", "the beginning of a branch before its end"
    if role == "unopened block" and repair.in_branch:
        return "nested too deep", "no fork in this branch"
    return "tag in the wrong place", "text"
