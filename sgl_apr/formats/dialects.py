"""Dialects: a grammar file plus the few facts it cannot say; no tag is spelled here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, NoReturn

from sgl_apr.errors import GrammarError, TraceError
from sgl_apr.formats import completion as complete
from sgl_apr.formats import graph_builder
from sgl_apr.formats.grammar import NUMBER, Grammar, grammar_path
from sgl_apr.formats.graph_builder import OpenBlock, ParserFrame, SpanGraphBuilder
from sgl_apr.formats.masks.document import lower_document
from sgl_apr.formats.masks.lower import lower
from sgl_apr.formats.masks.writer import Backend, MaskOptions
from sgl_apr.formats.options import FormatOptions, check_facts, read_facts
from sgl_apr.formats.segmenter import Outline, Segment, error_at, segments
from sgl_apr.tokenizer import Tokenizer, split_ids
from sgl_apr.trajectory.trajectory import Trajectory

Phase = Literal["trunk", "after", "branch", "rejoin"]
ENTRY_POINTS = "sgl_apr.dialects"


@dataclass(frozen=True, slots=True)
class BranchNumbering:
    """Where a phase decodes, as far as its numbers depend on it.

    `prefix` is that of the numbers of a fork (`3.` in branch 3); `number` that of the branch itself, or
    of the next one in a dialect that forks one at a time; `waiting` are those it may wait for.
    """

    prefix: str = ""
    number: str = ""
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dialect(FormatOptions):
    """One trajectory format: make one with `from_file` or `from_source`.

    Rules with a meaning to the runtime: `trace` is a whole reply; `trunk` and `after` (of the trunk, first
    and behind a join), `branch` and `rejoin` (the same in a branch; `body` where branches don't nest) are
    the phases, what one request decodes; `lead`, `header`, `tail` and `result` are what the runtime writes
    before the branches, before each, after them, and for what each returned; `fork` holds the `outline`s;
    `wait` asks for a branch that was forked off before; `closer` and `close` end a branch and a block.
    A grammar without `trunk` begins with its branches.
    """

    name: str
    source: str = field(repr=False)

    @classmethod
    def from_file(cls, path: str | Path, **facts: Any) -> Dialect:
        """A dialect of your own from a .lark file; its name is the file's. `facts` win over those in the file."""
        path = Path(path)
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise GrammarError(
                f"cannot read the grammar {path}: {getattr(error, 'strerror', error)}"
            ) from None
        return cls.from_source(path.stem, source, **facts)

    @classmethod
    def from_source(cls, name: str, source: str, **facts: Any) -> Dialect:
        """The same from text. Raises `GrammarError` with the line for what the file may not hold."""
        where = f"{name}.lark"
        grammar = Grammar(source, where)
        made = cls(name=name, source=source, **{**read_facts(grammar.facts, where), **facts})
        check_facts(made, where)
        needed = ["trace", "body", "after"]
        needed += ["result"] if made.branch_context == "message" else []
        needed += ["branch", "rejoin"] if made.max_depth > 1 else []
        for rule in needed:
            grammar.rule(rule)
        grammar.parser("trace")
        return made

    @cached_property
    def grammar(self) -> Grammar:
        """The file as rules."""
        return Grammar(self.source, f"{self.name}.lark")

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag that a tokenizer may have as one token; numbered ones up to `max_width`."""
        return self.grammar.tags([str(self.first_number + k) for k in range(self.max_width)])

    @property
    def asynchronous(self) -> bool:
        """Whether the trunk goes on while its branches run, and waits for them later."""
        return "wait" in self.grammar.rules

    @property
    def nested_numbering(self) -> bool:
        """Whether the branches of branch 3 are 3.1, 3.2, ...; otherwise each fork counts anew."""
        pattern = self.grammar.terminals.get(NUMBER)
        return isinstance(pattern, str) and re.fullmatch(pattern, "1.1") is not None

    @property
    def unlabelled_branches(self) -> bool:
        """Whether a fork says nothing of its branches, so that they differ by chance alone."""
        return "outline" not in self.grammar.rules and not self.asynchronous

    @property
    def removes_call_from_context(self) -> bool:
        """Whether a join takes the fork out of what the trunk goes on from."""
        return self.branch_context == "message" and not self.asynchronous

    def parse(self, text: str, tokenizer: Tokenizer | None = None) -> Trajectory:
        """A finished reply as a trajectory; raises `TraceError`. With a tokenizer it has token ids."""
        found = segments(self.grammar, "trace", text)
        ids: list[tuple[int, ...] | None] = [None] * len(found)
        if tokenizer is not None:
            ids = list(split_ids(tokenizer.encode(text), text, [s.end for s in found], tokenizer))
        spans = graph_builder.build_spans(found, text, ids, self.structure(_raise_on_defect(text)))
        return Trajectory(tuple(spans), self.name)

    def structure(
        self, report: graph_builder.DefectReporter, start: ParserFrame | None = None
    ) -> SpanGraphBuilder:
        """What places the segments of a text; `report` hears what is wrong."""
        return SpanGraphBuilder(self, report, asynchronous=self.asynchronous, start=start)

    def render(self, trajectory: Trajectory) -> str:
        """The text of a trajectory: `render(parse(x)) == x`."""
        return trajectory.text

    def validate(self, text: str) -> None:
        """Raise `TraceError` if `text` is not a whole, rightly numbered reply of this dialect."""
        found = segments(self.grammar, "trace", text)
        graph_builder.build_spans(found, text, [None] * len(found), self.structure(_raise_on_defect(text)))

    def is_valid(self, text: str) -> bool:
        """Whether `validate` passes."""
        try:
            self.validate(text)
        except TraceError:
            return False
        return True

    def llguidance(self, phase: str, tokenizer: Tokenizer, **shape: Any) -> str:
        """The mask of one phase, as text for a server that runs llguidance.

        `shape` are the fields of `sgl_apr.formats.masks.writer.Shape` (width, fork, ...). The phase "trace" is a
        whole document, for which every tag has to be one token.
        """
        return self.lower(phase, tokenizer, "llguidance", **shape)

    def xgrammar(self, phase: str, tokenizer: Tokenizer, **shape: Any) -> str:
        """The same for a server that runs xgrammar; the tokenizer has to have every tag as one token."""
        return self.lower(phase, tokenizer, "xgrammar", **shape)

    def lower(self, phase: str, tokenizer: Tokenizer, backend: Backend, **shape: Any) -> str:
        """The mask of one phase for a grammar backend."""
        wanted = MaskOptions(
            **{"first_number": self.first_number, "width": self.width, "min_width": self.min_width, **shape}
        )
        if not 1 <= wanted.min_width <= wanted.width <= self.max_width:
            raise GrammarError(
                f"{self.name}: width {wanted.min_width} to {wanted.width}, expected within 1 to {self.max_width}"
            )
        if not 1 <= wanted.depth <= self.max_depth:
            raise GrammarError(f"{self.name}: depth {wanted.depth}, expected within 1 to {self.max_depth}")
        return _lowered(self, self.rule_for_phase(phase), tokenizer, wanted, backend)

    def rule_for_phase(self, phase: str) -> str:
        """The rule of a phase: `body` is the phase of a branch where branches don't nest."""
        return "body" if phase == "branch" and phase not in self.grammar.rules else phase

    def stop_strings(self, phase: Phase, place: BranchNumbering = BranchNumbering()) -> tuple[str, ...]:
        """Where decoding of a phase stops: behind a fork, a wait, or the end of a branch."""
        found = [self.grammar.closing_literal("body", place.number)] if phase in ("branch", "rejoin") else []
        if self.rule_for_phase(phase) != "body":
            found.append(self.grammar.closing_literal("fork", place.number))
            found += [self.grammar.closing_literal("wait", n) for n in place.waiting]
        return tuple(dict.fromkeys(s for s in found if s))

    def segments(self, phase: Phase, text: str, place: BranchNumbering = BranchNumbering()) -> list[Segment]:
        """What a finished phase wrote, cut by role; raises `TraceError`."""
        *rules, last = self._candidate_rules(phase)
        for rule in rules:
            try:
                return self._checked(segments(self.grammar, rule, text), text, place)
            except TraceError:
                continue
        if not text and self._may_be_empty(phase):
            return []
        return self._checked(segments(self.grammar, last, text), text, place)

    def _checked(self, found: list[Segment], text: str, place: BranchNumbering) -> list[Segment]:
        sequence = ParserFrame(prefix=place.prefix, number=place.number)
        if self.asynchronous and place.number:
            ahead = [Outline(str(n), "", 0) for n in range(self.first_number, int(place.number))]
            waiting = [o for o in ahead if o.number in place.waiting]
            sequence.block = OpenBlock(1, ahead, waiting) if waiting else None
        known = self.structure(_raise_on_defect(text), sequence)
        for index, segment in enumerate(found):
            known.place(segment, index)
        return found

    def completion(self, phase: Phase, text: str, place: BranchNumbering = BranchNumbering()) -> str | None:
        """What closes a phase that was cut off, or None if `text` is beyond repair."""

        def number(count: int, behind: str) -> str:
            if behind and behind == self.grammar.opening_literal("wait"):
                return place.waiting[0] if place.waiting else str(self.first_number)
            outlined = self.grammar.repeats("fork") and behind != self.grammar.opening_literal("closer")
            return (not outlined and place.number) or f"{place.prefix}{self.first_number + count}"

        if not text and self._may_be_empty(phase):
            return ""
        options = (
            complete.completion(self.grammar, rule, text, number) for rule in self._candidate_rules(phase)
        )
        return next((o for o in options if o is not None), None)

    def _may_be_empty(self, phase: Phase) -> bool:
        """Whether a reply may end with the join; one that began with its branches has to say something."""
        return phase == "after" and "trunk" in self.grammar.rules and "close" not in self.grammar.rules

    def _candidate_rules(self, phase: Phase) -> tuple[str, ...]:
        """Where decoding was cut, each of these rules is tried as the whole of what that phase wrote."""
        rule = self.rule_for_phase(phase)
        return ("close", rule) if phase == "after" and "close" in self.grammar.rules else (rule,)


def _raise_on_defect(text: str) -> graph_builder.DefectReporter:
    def raise_(name: str, start: int, end: int, expected: str) -> NoReturn:
        raise error_at(text, start, text[start:end], [expected])

    return raise_


@lru_cache(maxsize=256)
def _lowered(dialect: Dialect, rule: str, tokenizer: Tokenizer, shape: MaskOptions, backend: Backend) -> str:
    if rule == "trace":
        return lower_document(dialect.grammar, rule, tokenizer, shape, backend)
    return lower(dialect.grammar, rule, tokenizer, shape, backend)


@lru_cache
def dialect(name: str) -> Dialect:
    """A dialect by name, built in or of an installed package; raises `GrammarError` that lists the names."""
    path = grammar_path(name)
    if path.exists():
        return Dialect.from_file(path)
    for point in entry_points(group=ENTRY_POINTS, name=name):
        made = point.load()
        made = made() if callable(made) and not isinstance(made, Dialect) else made
        if not isinstance(made, Dialect):
            raise GrammarError(
                f"the entry point {point.value} of {name!r} gives {made!r}, expected a Dialect"
            )
        return made
    raise GrammarError(f"no dialect {name!r}, expected one of {', '.join(dialect_names())}")


def dialect_names() -> list[str]:
    """The names of all dialects, built in and of installed packages."""
    return sorted({p.stem for p in grammar_path("any").parent.glob("*.lark")} | set(_installed()))


def _installed() -> Iterator[str]:
    return (point.name for point in entry_points(group=ENTRY_POINTS))
