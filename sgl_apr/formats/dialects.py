"""Dialects: trajectory formats, each made of a grammar file and its options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from sgl_apr.errors import GrammarError, TraceError
from sgl_apr.formats import graph_builder
from sgl_apr.formats.completion import complete_text
from sgl_apr.formats.entry_points import installed_entry_points, load_entry_point, unknown_name_error
from sgl_apr.formats.grammar import NUMBER, Grammar
from sgl_apr.formats.grammar_source import built_in_names, grammar_path, read_grammar_file
from sgl_apr.formats.graph_builder import ParserFrame, SpanGraphBuilder
from sgl_apr.formats.masks.document import lower_document
from sgl_apr.formats.masks.lower import check_widths, lower
from sgl_apr.formats.masks.writer import GrammarBackend, MaskOptions
from sgl_apr.formats.options import (
    NO_NUMBERING,
    FormatOptions,
    check_dialect_name,
    resolve_options,
    validate_options,
)
from sgl_apr.formats.options import BranchNumbering as BranchNumbering
from sgl_apr.formats.options import Phase as Phase
from sgl_apr.formats.phases import check_phase_numbers, number_in_completion, phase_stop_strings
from sgl_apr.formats.resumption import drop_prefix, resumption_prefixes
from sgl_apr.formats.segmenter import Segment, match_segments, raise_on_defect, split_segments
from sgl_apr.formats.token_split import split_token_ids
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory

ENTRY_POINT_GROUP = "sgl_apr.dialects"


@dataclass(frozen=True)
class Dialect(FormatOptions):
    """One trajectory format. Use `from_file` or `from_source` to make one.

    These rules of a grammar have a meaning for the runtime:

    - `trace` is a complete reply.
    - `trunk`, `after`, `branch` and `rejoin` are the phases, each of which is decoded by one request: the trunk
      before and after a join, and a branch before and after a join of its own. Where branches do not nest, `body`
      is the phase of a branch. A grammar without `trunk` begins with its branches.
    - `lead`, `header`, `tail` and `result` are written by the runtime: before all branches, before each branch,
      after all branches, and for what each branch returned.
    - `fork` holds the `outline`s. `wait` requests the result of a branch that was forked off earlier.
    - `closer` ends a branch, and `close` ends a block.

    Attributes:
        name: The name of the dialect.
        source: The text of its grammar file.
    """

    name: str
    source: str = field(repr=False)

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> Dialect:
        """Make a dialect from a .lark file. Its name is the name of the file without the suffix.

        Args:
            path: The grammar file.
            **options: Fields of `FormatOptions`. They override the options that the file declares.

        Raises:
            GrammarError: The file cannot be read or holds something that is not supported.
        """
        path = Path(path)
        return cls._build(path.stem, read_grammar_file(path), str(path), options)

    def __hash__(self) -> int:
        return hash((self.name, self.source))  # quick, since caches ask for it at every request

    def __reduce__(self) -> tuple[Any, ...]:
        """Fields alone. Equal dialects are unpickled as one object, so that each process makes one parser."""
        return _restore, (type(self), tuple((f.name, getattr(self, f.name)) for f in fields(self)))

    @classmethod
    def from_source(cls, name: str, source: str, **options: Any) -> Dialect:
        """Make a dialect from the text of a grammar file.

        Args:
            name: The name of the dialect.
            source: The text of the grammar file.
            **options: Fields of `FormatOptions`. They override the options that the file declares.

        Raises:
            GrammarError: The file holds something that is not supported. The message names the line.
        """
        return cls._build(name, source, f"{name}.lark", options)

    @classmethod
    def _build(cls, name: str, source: str, where: str, options: Mapping[str, Any]) -> Dialect:
        grammar = Grammar(source, where)
        dialect = cls(name=name, source=source, **resolve_options(grammar.declared_options, options, where))
        validate_options(dialect, where)
        required = ["trace", "body", "after"]
        required += ["result"] if dialect.branch_context == "message" else []
        required += ["branch", "rejoin"] if dialect.max_depth > 1 else []
        for rule in required:
            grammar.rule(rule)
        grammar.parser("trace")
        return dialect

    @cached_property
    def grammar(self) -> Grammar:
        """The grammar of the file."""
        return Grammar(self.source, f"{self.name}.lark")

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag that can be one token of a tokenizer. Numbered tags go up to `max_width`."""
        return self.grammar.tags([str(self.first_number + k) for k in range(self.max_width)])

    @cached_property
    def asynchronous(self) -> bool:
        """Whether the trunk continues while its branches run, and waits for them later."""
        return "wait" in self.grammar.rules

    @cached_property
    def nested_numbering(self) -> bool:
        """Whether the branches of branch 3 are 3.1, 3.2, ...; otherwise each fork restarts the count."""
        pattern = self.grammar.terminals.get(NUMBER)
        return isinstance(pattern, str) and re.fullmatch(pattern, "1.1") is not None

    @cached_property
    def unlabelled_branches(self) -> bool:
        """Whether a fork has no outlines, so that its branches differ only by sampling."""
        return "outline" not in self.grammar.rules and not self.asynchronous

    @cached_property
    def removes_call_from_context(self) -> bool:
        """Whether a join removes the fork from the context of the trunk."""
        return self.branch_context == "message" and not self.asynchronous

    def parse(self, text: str, tokenizer: Tokenizer | None = None) -> Trajectory:
        """Parse a complete reply.

        Args:
            text: The reply, without its prompt.
            tokenizer: Adds token ids to the trajectory.

        Raises:
            TraceError: The text is not a valid reply of this dialect. `apr.read` accepts any text.
        """
        segments = split_segments(self.grammar, "trace", text)
        ids: list[tuple[int, ...] | None] = [None] * len(segments)
        if tokenizer is not None:
            ids = list(split_token_ids(tokenizer.encode(text), text, [s.end for s in segments], tokenizer))
        spans = graph_builder.build_spans(segments, text, ids, self.span_builder(raise_on_defect(text)))
        return Trajectory(tuple(spans), self.name)

    def span_builder(
        self, report: graph_builder.DefectReporter, start: ParserFrame | None = None
    ) -> SpanGraphBuilder:
        """Return a builder of span graphs. `report` is called for every defect."""
        return SpanGraphBuilder(self, report, asynchronous=self.asynchronous, start=start)

    def render(self, trajectory: Trajectory) -> str:
        """Return the text of a trajectory. It is the inverse of `parse`: `render(parse(text)) == text`."""
        return trajectory.text

    def validate(self, text: str) -> None:
        """Check that a text is a complete and correctly numbered reply of this dialect.

        Raises:
            TraceError: It is not. The exception has the line, the column, what was found and what was expected.
        """
        self.parse(text)

    def is_valid(self, text: str) -> bool:
        """Return whether `validate` accepts a text."""
        try:
            self.validate(text)
        except TraceError:
            return False
        return True

    def llguidance(self, phase: str, tokenizer: Tokenizer, **options: Any) -> str:
        """Return the mask of a phase for llguidance: `lower` with that backend."""
        return self.lower(phase, tokenizer, "llguidance", **options)

    def lower(self, phase: str, tokenizer: Tokenizer, backend: GrammarBackend, **options: Any) -> str:
        """Return the mask of a phase, as the text that a grammar backend compiles.

        Args:
            phase: A phase, or "trace" for a complete reply with all of its branches, which lets a stock engine
                decode one sequentially in one request. "trace" needs llguidance and every tag as one token.
            tokenizer: The tokenizer of the model. For xgrammar it needs every tag as one token.
            backend: The grammar backend of the server.
            **options: Fields of `sgl_apr.formats.MaskOptions` (`width`, `fork`, ...).

        Raises:
            GrammarError: The phase cannot be lowered with these options, or the dialect does not allow them.
        """
        return _lower(self, phase, tokenizer, backend, **options)

    def rule_for_phase(self, phase: str) -> str:
        """Return the rule of a phase. Where branches do not nest, the rule of the phase "branch" is `body`."""
        return "body" if phase == "branch" and phase not in self.grammar.rules else phase

    def stop_strings(self, phase: Phase, numbering: BranchNumbering = NO_NUMBERING) -> tuple[str, ...]:
        """Return the texts at which decoding of a phase stops: the ends of a fork, of a wait, or of the branch."""
        return phase_stop_strings(self.grammar, phase, self.rule_for_phase(phase), numbering)

    def parse_phase(
        self, phase: Phase, text: str, numbering: BranchNumbering = NO_NUMBERING
    ) -> list[Segment]:
        """Split the text of a finished phase into segments.

        Args:
            phase: The phase.
            text: What it decoded.
            numbering: The numbers that it can write.

        Raises:
            TraceError: The text is not one that the phase can decode.
        """
        segments = self.match_phase(phase, text, numbering)
        if segments is None:
            segments = split_segments(self.grammar, self._candidate_rules(phase)[-1], text)
            check_phase_numbers(self, segments, text, numbering, asynchronous=self.asynchronous)
        return segments

    def match_phase(
        self, phase: Phase, text: str, numbering: BranchNumbering = NO_NUMBERING, *, resumed: bool = False
    ) -> list[Segment] | None:
        """Split the text of a phase, perhaps resumed, as `parse_phase` does; None if the phase cannot decode it."""
        if resumed:
            for prefix in resumption_prefixes(self.grammar, self.rule_for_phase(phase)):
                segments = self.match_phase(phase, prefix + text, numbering)
                if segments is not None:
                    return drop_prefix(segments, len(prefix))
            return None
        for rule in self._candidate_rules(phase):
            segments = match_segments(self.grammar, rule, text)
            if segments is not None:
                try:
                    check_phase_numbers(self, segments, text, numbering, asynchronous=self.asynchronous)
                except TraceError:
                    continue
                return segments
        return [] if not text and self._may_be_empty(phase) else None

    def complete_phase(
        self, phase: Phase, text: str, numbering: BranchNumbering = NO_NUMBERING, *, resumed: bool = False
    ) -> str | None:
        """Return the shortest text that completes a phase that was cut off; None if nothing does.

        Args:
            phase: The phase.
            text: What it decoded before it was cut off.
            numbering: The numbers that it can write.
            resumed: Whether it continued after the result of a tool, so that it began in its free text.
        """
        if resumed:
            prefixes = resumption_prefixes(self.grammar, self.rule_for_phase(phase))
            options = (self.complete_phase(phase, prefix + text, numbering) for prefix in prefixes)
            return next((o for o in options if o is not None), None)
        if not text and self._may_be_empty(phase):
            return ""
        number = number_in_completion(self.grammar, self.first_number, numbering)
        options = (complete_text(self.grammar, rule, text, number) for rule in self._candidate_rules(phase))
        return next((o for o in options if o is not None), None)

    def _may_be_empty(self, phase: Phase) -> bool:
        """Whether a reply can end with the join. A reply that began with its branches needs an answer."""
        return phase == "after" and "trunk" in self.grammar.rules and "close" not in self.grammar.rules

    def _candidate_rules(self, phase: Phase) -> tuple[str, ...]:
        """The rules that the text of a phase can match if it was cut off, in the order in which they are tried."""
        rule = self.rule_for_phase(phase)
        return ("close", rule) if phase == "after" and "close" in self.grammar.rules else (rule,)


@lru_cache(maxsize=256)  # called for every request
def _lower(
    dialect: Dialect, phase: str, tokenizer: Tokenizer, backend: GrammarBackend, **options: Any
) -> str:
    defaults = {"first_number": dialect.first_number, "width": dialect.width, "min_width": dialect.min_width}
    mask_options = MaskOptions(**{**defaults, **options})
    check_widths(dialect.name, mask_options, dialect.max_width, dialect.max_depth)
    rule = dialect.rule_for_phase(phase)
    if rule == "trace":
        return lower_document(dialect.grammar, rule, tokenizer, mask_options, backend)
    return lower(dialect.grammar, rule, tokenizer, mask_options, backend)


@lru_cache(maxsize=64)
def _restore(kind: type[Dialect], values: tuple[tuple[str, Any], ...]) -> Dialect:
    return kind(**dict(values))


_registered: dict[str, Dialect] = {}


def register_dialect(dialect: Dialect) -> None:
    """Make a dialect available by its name, in this process. A second one of that name replaces the first.

    Raises:
        GrammarError: The name is that of another dialect, built-in or of an installed package, or cannot be used in
            a request.
    """
    name = check_dialect_name(dialect.name)
    if name not in _registered and name in dialect_names() and _find(name) != dialect:
        raise GrammarError(f"there already is a dialect {name!r}, expected another name of the file")
    _registered[name] = dialect


def dialect(name: str) -> Dialect:
    """Return a dialect by name: a built-in one, a registered one, or one of an installed package.

    A name is never read as a path, because it can come from a request or a file: `Dialect.from_file` loads a file. A
    package declares its dialects as entry points of the group `sgl_apr.dialects`.

    Raises:
        GrammarError: There is no such dialect. The message lists the names.
    """
    if isinstance(name, str) and (found := _find(name)) is not None:
        return found
    raise unknown_name_error("dialect", name, dialect_names())


def _find(name: str) -> Dialect | None:
    if name in built_in_names():
        return _built_in(name)
    if name in _registered:
        return _registered[name]
    for point in (p for p in installed_entry_points(ENTRY_POINT_GROUP) if p.name == name):
        loaded: Dialect = load_entry_point(point, Dialect, "a Dialect", may_call=True)
        return loaded
    return None


@lru_cache
def _built_in(name: str) -> Dialect:
    return Dialect.from_file(grammar_path(name))


def dialect_names() -> list[str]:
    """Return the names of all dialects: built-in, registered, and of installed packages."""
    installed = (point.name for point in installed_entry_points(ENTRY_POINT_GROUP))
    return sorted({*built_in_names(), *_registered, *installed})
