"""Segments of a reply to its structure: numbers checked, paths and parents found; it reads no text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sgl_apr.formats.options import FormatOptions
from sgl_apr.formats.segmenter import Outline, Segment
from sgl_apr.trajectory.spans import Path, Span

# Hears of what is wrong: its name, where it stands (start and end offsets), and what was expected.
DefectReporter = Callable[[str, int, int, str], None]


@dataclass(frozen=True, slots=True)
class SpanPlacement:
    """Where a segment belongs: what its span gets besides its text."""

    path: Path
    parents: tuple[int, ...]
    label: str
    outline: str = ""


@dataclass
class OpenBlock:
    """A block whose branches are being read. `unread` are the outlines whose branch or result is to come."""

    number: int
    outlines: list[Outline]
    pending: list[Outline]
    forks: list[tuple[int, ...]] = field(default_factory=list)  # where each branch starts from
    ends: list[int] = field(default_factory=list)
    read: int = 0


@dataclass
class ParserFrame:
    """The trunk or a branch, as far as it has been read. `tip` are the spans that its next span follows."""

    path: Path = ()
    prefix: str = ""
    number: str = ""
    frontier: tuple[int, ...] = ()
    blocks: int = 0
    block: OpenBlock | None = None


class SpanGraphBuilder:
    """Takes segments in order and knows where each belongs; ask `place` for the path and parents of the next.

    `asynchronous` dialects fork one branch at a time and wait for it later.
    """

    def __init__(
        self,
        facts: FormatOptions,
        report: DefectReporter,
        *,
        asynchronous: bool,
        start: ParserFrame | None = None,
    ) -> None:
        self.facts, self.report, self.asynchronous = facts, report, asynchronous
        self.sequences = [start or ParserFrame()]
        # A join by message takes the call out of what the trunk goes on from.
        self.keeps_calls = asynchronous or facts.branch_context == "prefix"

    def place(self, segment: Segment, index: int) -> SpanPlacement:
        """Where the segment that becomes span `index` belongs; reports what does not fit."""
        sequence = self.sequences[-1]
        placed = SpanPlacement(sequence.path, sequence.frontier, segment.label)
        if segment.role in ("text", "body", "fork", "wait"):
            self._check_all_branches_present(sequence, segment)
        match segment.role:
            case "fork":
                self._fork(sequence, segment, index)
            case "header":
                placed = self._header(sequence, segment)
                sequence = self.sequences[-1]
            case "closer":
                self._closer(sequence, segment, index)
            case "lead" if sequence.block:
                sequence.block.forks = [(index,)] * len(sequence.block.forks)
            case "result":
                placed = self._result(sequence, segment)
            case "wait":
                self._wait(sequence, segment, index)
            case "tail":
                placed = replace(placed, parents=self._tail(sequence, segment))
        if segment.role != "fork" and not (
            segment.role == "closer" and sequence.path != self.sequences[0].path
        ):
            sequence.frontier = (index,)
        return placed

    def end(self, at: int) -> None:
        """The text ends at offset `at`: nothing may be open."""
        block = self.sequences[0].block
        if block and block.pending:
            missing = block.pending[0].number or "the next one"
            self.report("block never closed", at, at, f"branch {missing}, which was forked off")

    def _check_all_branches_present(self, sequence: ParserFrame, segment: Segment) -> None:
        """Where branches stand behind the wait for them, all do."""
        block = sequence.block
        if block and block.ends and block.pending:
            self.report("missing branch", segment.start, segment.start, "a branch for every fork")
            sequence.frontier, sequence.block = (*sequence.frontier, *block.ends), None

    def _fork(self, sequence: ParserFrame, segment: Segment, index: int) -> None:
        block, facts = sequence.block, self.facts
        if block is None or not (self.asynchronous and block.pending):
            sequence.blocks += 1
            block = sequence.block = OpenBlock(sequence.blocks, [], [])
            if len(sequence.path) // 2 >= facts.max_depth:
                self.report(
                    "nested too deep", segment.start, segment.end, f"at most {facts.max_depth} levels"
                )
        for outline in segment.outlines:
            want = f"{sequence.prefix}{facts.first_number + len(block.outlines)}"
            if outline.number and outline.number != want:
                known = any(o.number == outline.number for o in block.outlines)
                self.report(
                    "duplicate number" if known else "missing number",
                    outline.at,
                    outline.at + len(outline.number),
                    f'"{want}"',
                )
            if len(block.outlines) >= facts.max_width:
                self.report(
                    "too many branches",
                    outline.at,
                    outline.at + len(outline.number),
                    f"at most {facts.max_width} outlines",
                )
            if not outline.number and len(segment.outlines) > 1:  # put in where it was missing
                outline = outline._replace(number=want)
            block.outlines.append(outline)
            block.pending.append(outline)
            block.forks.append((index,))
        if not segment.outlines:
            block.forks = [(index,)]
        if self.keeps_calls:
            sequence.frontier = (index,)

    def _header(self, sequence: ParserFrame, segment: Segment) -> SpanPlacement:
        block, facts = sequence.block, self.facts
        if block is None:  # a format whose reply begins with its branches
            if self.asynchronous:
                self.report("branch without a fork", segment.start, segment.end, "one branch for every fork")
            sequence.blocks += 1
            block = sequence.block = OpenBlock(sequence.blocks, [], [], [sequence.frontier])
        block.read += 1
        outline = block.pending.pop(0) if block.pending else None
        label = outline.text if outline else ""
        if block.outlines:
            if outline is None or (segment.number and segment.number != outline.number):
                known = any(o.number == segment.number for o in block.outlines[: block.read - 1])
                self.report(
                    "duplicate number"
                    if known
                    else "branch without an outline"
                    if outline is None
                    else "missing number",
                    segment.start,
                    segment.end,
                    "the branch that is next in the outlines",
                )
        elif segment.number and segment.number != f"{sequence.prefix}{facts.first_number + block.read - 1}":
            self.report(
                "missing number", segment.start, segment.end, f'"{facts.first_number + block.read - 1}"'
            )
        if block.read > facts.max_width:
            self.report(
                "too many branches", segment.start, segment.end, f"at most {facts.max_width} branches"
            )
        start = block.forks[min(block.read, len(block.forks)) - 1] if block.forks else sequence.frontier
        path = (*sequence.path, block.number, block.read)
        prefix = f"{segment.number}." if segment.number else ""
        self.sequences.append(ParserFrame(path, prefix, segment.number))
        return SpanPlacement(path, start, label)

    def _closer(self, sequence: ParserFrame, segment: Segment, index: int) -> None:
        if segment.number and sequence.number and segment.number != sequence.number:
            self.report("number of the closer", segment.start, segment.end, f'"{sequence.number}"')
        if len(self.sequences) < 2:
            return
        self.sequences.pop()
        outer = self.sequences[-1]
        if outer.block is not None:
            outer.block.ends.append(index)
            if self.asynchronous and not outer.block.pending:
                outer.frontier = (*outer.frontier, *outer.block.ends)
                outer.block = None

    def _result(self, sequence: ParserFrame, segment: Segment) -> SpanPlacement:
        block = sequence.block
        open_ = block.pending if block else []
        wanted = next((o for o in open_ if o.number == segment.number), None)
        if block is None or wanted is None or (not self.asynchronous and wanted is not open_[0]):
            self.report("missing number", segment.start, segment.end, "the branch that is next in the call")
            path = (*sequence.path, sequence.blocks, (block.read if block else 0) + 1)
            return SpanPlacement(path, sequence.frontier, segment.label)
        if segment.name and segment.name != wanted.text:
            self.report("result of another branch", segment.start, segment.end, wanted.text)
        open_.remove(wanted)
        block.read += 1
        path = (*sequence.path, block.number, block.outlines.index(wanted) + 1)
        if self.asynchronous and not open_:
            sequence.block = None
        return SpanPlacement(path, sequence.frontier, segment.label, wanted.text)

    def _wait(self, sequence: ParserFrame, segment: Segment, index: int) -> None:
        unread = sequence.block.pending if sequence.block else []
        known = [o.number for o in unread]
        if not unread or (segment.number and segment.number not in known):
            self.report(
                "join without a fork", segment.start, segment.end, f"one of {', '.join(known) or 'none'}"
            )

    def _tail(self, sequence: ParserFrame, segment: Segment) -> tuple[int, ...]:
        block = sequence.block
        if block is None:
            return sequence.frontier
        if block.pending:
            self.report(
                "missing branch",
                segment.start,
                segment.start,
                f"branch {block.pending[0].number}, which has an outline",
            )
        sequence.block = None
        return tuple(block.ends) if block.ends else sequence.frontier


def build_spans(
    found: Sequence[Segment],
    text: str,
    ids: Sequence[tuple[int, ...] | None],
    structure: SpanGraphBuilder,
) -> list[Span]:
    """Spans of a whole text, all of it counted as decoded; the structure reports what is wrong."""
    spans: list[Span] = []
    for index, (segment, token_ids) in enumerate(zip(found, ids, strict=True)):
        placed = structure.place(segment, index)
        spans.append(
            Span(
                role=segment.role,
                origin="decoded",
                text=text[segment.start : segment.end],
                token_ids=token_ids,
                parents=placed.parents,
                path=placed.path,
                label=placed.label,
                outline=placed.outline,
                finish="stop" if segment.role == "closer" else None,
            )
        )
    structure.end(len(text))
    return spans
