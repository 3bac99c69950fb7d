"""Lenient parsing of finished text from any model: a trajectory of what can be read, and a list of defects."""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from lark import Token

from sgl_apr.errors import AprError, TraceError
from sgl_apr.formats.dialects import Dialect, dialect, dialect_names
from sgl_apr.formats.error_recovery import ErrorRecoveringParser, Repair
from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar
from sgl_apr.formats.graph_builder import build_spans
from sgl_apr.formats.lalr_driver import LalrParser
from sgl_apr.formats.segmenter import Segment, segments_of
from sgl_apr.formats.token_split import split_token_ids
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory

DEFAULT_DIALECT = "threadweaver"  # of a text without any tag
LONG_TEXT = 1 << 16  # characters
MAX_FOUND_CHARS = 40  # how much of a defect's text is reported


@dataclass(frozen=True, slots=True)
class Defect:
    """One defect of a text.

    Attributes:
        name: What kind of defect it is.
        offset: Where it is, in characters from 0.
        line: Its line, from 1.
        column: Its column, from 1.
        found: The text that stands there; empty if something is missing.
        expected: What the dialect expects there.
    """

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
    """The result of `read`.

    Attributes:
        trajectory: The trajectory. It holds every character of the text.
        defects: What is wrong with the text, in the order of the text; empty if it is valid.
    """

    trajectory: Trajectory
    defects: tuple[Defect, ...] = ()

    @property
    def is_valid(self) -> bool:
        """Whether strict parsing accepts the text."""
        return not self.defects


def read(
    text: str,
    dialect: Dialect | str | None = None,
    *,
    prompt: str = "",
    tokenizer: Tokenizer | None = None,
) -> Reading:
    """Parse a reply, however broken it is. Takes time linear in the length of the text.

    A missing tag is assumed where that lets the rest be read, and a misplaced tag counts as text. Both are
    reported as defects. No text raises an exception, unless a tokenizer cannot encode it.

    Args:
        text: The reply.
        dialect: The dialect, or its name. By default the one that `detect` finds.
        prompt: The prompt of the reply. Tags in it have no meaning.
        tokenizer: Adds token ids to the trajectory.

    Returns:
        The trajectory and the defects.

    Raises:
        AprError: The reply is not text, or there is a tokenizer, and the text or prompt holds half a surrogate pair.
    """
    if not isinstance(text, str):
        raise AprError(f"the reply is of type {type(text).__name__}, expected text")
    with _without_garbage_collection(len(text) >= LONG_TEXT):
        resolved = _resolve_dialect(dialect or detect(text) or DEFAULT_DIALECT)
        try:
            reading = Reading(resolved.parse(text, tokenizer))
        except TraceError:
            reading = _parse_with_recovery(text, resolved, tokenizer)
    if not prompt:
        return reading
    ids = tuple(tokenizer.encode(prompt, add_special_tokens=True)) if tokenizer else None
    return Reading(reading.trajectory.with_prompt(prompt, ids), reading.defects)


@contextmanager
def _without_garbage_collection(pause: bool) -> Iterator[None]:
    """Pause the search for reference cycles: it takes half of the time where many objects are made, and finds none."""
    pause = pause and gc.isenabled()
    if pause:
        gc.disable()
    try:
        yield
    finally:
        if pause:
            gc.enable()


def detect(text: str) -> str | None:
    """Return the name of the dialect whose tags a text has, or None if it has no tags.

    The dialect with the most tags in the text wins. Ties are broken by whether the text is valid, then by the
    share of the dialect's tags that occur.
    """
    counts = {name: [text.count(m) for m in dialect(name).grammar.tag_literals] for name in dialect_names()}
    highest = max(map(sum, counts.values()))
    tied = [name for name, tag_counts in counts.items() if sum(tag_counts) == highest > 0]
    if len(tied) < 2:
        return tied[0] if tied else None
    return max(
        tied,
        key=lambda name: (dialect(name).is_valid(text), sum(map(bool, counts[name])) / len(counts[name])),
    )


def _resolve_dialect(name: Dialect | str) -> Dialect:
    return dialect(name) if isinstance(name, str) else name


def _parse_with_recovery(text: str, dialect: Dialect, tokenizer: Tokenizer | None) -> Reading:
    recovery = ErrorRecoveringParser(dialect.grammar, text, dialect.max_depth)
    recovery.run()
    line_starts = [0, *(i + 1 for i, c in enumerate(text) if c == "\n")]
    defects: dict[tuple[str, int], Defect] = {}

    def report(name: str, start: int, end: int, expected: str) -> None:
        line = bisect_right(line_starts, start)
        piece = text[start : min(end, start + MAX_FOUND_CHARS)]
        defects.setdefault(
            (name, start), Defect(name, start, line, start - line_starts[line - 1] + 1, piece, expected)
        )

    names = _defect_names_by_tag(dialect)
    for repair in recovery.repairs:
        for name, expected in _defects_of(repair, recovery, names):
            report(name, repair.offset, repair.end, expected)
    segments = _segments(dialect.grammar, recovery.tokens)
    if segments is None:  # nothing short completes a reply of this grammar
        report("beyond repair", 0, len(text), f"a reply of {dialect.name}")
    segments = _cover_text(segments or [], len(text))
    ids: list[tuple[int, ...] | None] = [None] * len(segments)
    if tokenizer is not None:
        ids = list(split_token_ids(tokenizer.encode(text), text, [s.end for s in segments], tokenizer))
    spans = build_spans(segments, text, ids, dialect.span_builder(report))
    if not defects:  # the strict parser rejects what recovery accepts, and the strict parser decides
        report("not valid", 0, 0, f"a reply of {dialect.name}")
    return Reading(
        Trajectory(tuple(spans), dialect.name), tuple(sorted(defects.values(), key=lambda d: d.offset))
    )


def _segments(grammar: Grammar, tokens: list[Token]) -> list[Segment] | None:
    """The segments of tokens; None if they do not make a complete reply."""
    parser = LalrParser(grammar.tables("trace"))
    for token in tokens:
        parser.feed((token.type, str(token), token.start_pos or 0, token.end_pos or 0))
    return segments_of(grammar, parser, keep_empty=True) if parser.finish() else None


def _cover_text(segments: list[Segment], size: int) -> list[Segment]:
    """Extend segments so that they cover the whole text: what lies between two belongs to the first."""
    if not segments or segments[0].start > 0:
        segments = [Segment("text", 0, segments[0].start if segments else size), *segments]
    ends = [s.start for s in segments[1:]] + [size]
    return [s._replace(end=max(end, s.start)) for s, end in zip(segments, ends, strict=True)]


@lru_cache(maxsize=64)
def _defect_names_by_tag(dialect: Dialect) -> dict[str, str]:
    """The name of the defect that a missing tag is."""
    grammar = dialect.grammar
    closing = grammar.closing_literal("body") or grammar.closing_literal("body", "1")
    # For each rule, the defects of its missing opening and of its missing ending.
    rules = [
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
    names = {tag: "unclosed branch" for tag in grammar.tag_literals if closing.startswith(tag)}
    for rule, opening, ending in rules:
        for literal, name in (
            (grammar.opening_literal(rule), opening),
            (grammar.closing_literal(rule), ending),
        ):
            for tag in grammar.tag_literals:
                if literal.startswith(tag):
                    names.setdefault(tag, name)
        for tag in grammar.tags_in_rule(rule):
            names.setdefault(tag, ending)
    return names


def _defects_of(
    repair: Repair, recovery: ErrorRecoveringParser, names: dict[str, str]
) -> list[tuple[str, str]]:
    """The defects that a repair stands for: names, with what was expected."""
    if not repair.inserted:
        return [_defect_of_misplaced_text(repair, recovery, names)]
    tags = [recovery.fixed[name] for name in repair.inserted if name in recovery.tags]
    missing = dict.fromkeys((names.get(tag, "missing tag"), tag) for tag in tags)
    if {"unopened branch", "unclosed branch"} <= {name for name, _ in missing}:
        missing = dict.fromkeys(("missing branch" if "branch" in n else n, tag) for n, tag in missing)
    if missing:
        return [(name, repr(tag)) for name, tag in missing]
    if NUMBER in repair.inserted:
        return [("missing number", "a number")]
    if TEXT in repair.inserted:
        return [("missing text", "free text")]
    return [("missing white space", " ".join(repr(recovery.fixed.get(n, n)) for n in repair.inserted))]


def _defect_of_misplaced_text(
    repair: Repair, recovery: ErrorRecoveringParser, names: dict[str, str]
) -> tuple[str, str]:
    name = next((n for tag, n in names.items() if recovery.text.startswith(tag, repair.offset)), None)
    if name is None:
        return "text where none belongs", "a tag"
    if "conclusion" in name and repair.in_branch:
        return "conclusion inside a branch", "the end of the branch"
    if name == "unclosed branch":
        return "unopened branch", "the beginning of a branch before its end"
    if name == "unopened block" and repair.in_branch:
        return "nested too deep", "no fork in this branch"
    return "tag in the wrong place", "text"
