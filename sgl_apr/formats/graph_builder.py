"""Builds the span graph of a reply from its segments: checks numbers, and finds the path and parents of each span."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from sgl_apr.formats.options import FormatOptions
from sgl_apr.formats.segmenter import Outline, Segment
from sgl_apr.trajectory.spans import Path, Span

MAX_LISTED_NUMBERS = 8  # numbers of branches in one error message
# Called for every defect, with its name, its start and end offsets, and what was expected.
DefectReporter = Callable[[str, int, int, str], None]


@dataclass(frozen=True, slots=True)
class SpanPlacement:
    """Where a segment belongs: the fields of its span other than its text."""

    path: Path
    parents: tuple[int, ...]
    label: str
    outline: str = ""


@dataclass
class OpenBlock:
    """A block whose branches are being read. Looking up a branch takes constant time, however many there are.

    Attributes:
        number: The number of the block in its sequence, from 1.
        fork_parents: For each branch, the spans that its first span follows.
        branch_ends: The last spans of the branches that have been read.
        branches_read: How many branches have been read.
        outline_count: How many branches have an outline.
        pending: The outlines of branches whose text or result has not been read yet, by their place in the fork.
    """

    number: int
    fork_parents: list[tuple[int, ...]] = field(default_factory=list)
    branch_ends: list[int] = field(default_factory=list)
    branches_read: int = 0
    outline_count: int = 0
    pending: OrderedDict[int, Outline] = field(default_factory=OrderedDict)
    _first_place: dict[str, int] = field(default_factory=dict)  # by number
    _pending_places: dict[str, deque[int]] = field(default_factory=dict)  # by number

    def add(self, outline: Outline, *, is_pending: bool = True) -> None:
        """Add the outline of the next branch."""
        place = self.outline_count
        self.outline_count += 1
        self._first_place.setdefault(outline.number, place)
        if is_pending:
            self.pending[place] = outline
            self._pending_places.setdefault(outline.number, deque()).append(place)

    def place_of(self, number: str) -> int | None:
        """Return the place of the first branch with a number, None if no outline has it."""
        return self._first_place.get(number)

    def pending_place(self, number: str) -> int | None:
        """Return the place of the first pending branch with a number, None if there is none."""
        places = self._pending_places.get(number)
        return places[0] if places else None

    def next_pending(self) -> int | None:
        """Return the place of the first pending branch, None if there is none."""
        return next(iter(self.pending), None)

    def take(self, place: int) -> Outline:
        """Remove a pending branch, which has to be the first one of its number, and return its outline."""
        outline = self.pending.pop(place)
        self._pending_places[outline.number].popleft()
        return outline

    def pending_numbers(self) -> str:
        """Return the numbers of the first pending branches, for error messages."""
        numbers = [outline.number for outline in islice(self.pending.values(), MAX_LISTED_NUMBERS)]
        more = ", ..." if len(self.pending) > len(numbers) else ""
        return f"{', '.join(numbers) or 'none'}{more}"


@dataclass
class ParserFrame:
    """The trunk or a branch that is being read.

    Attributes:
        path: Its path.
        prefix: The prefix of the numbers of its own branches (`3.` in branch 3).
        number: Its number; empty for the trunk.
        frontier: The spans that its next span follows.
        blocks: How many blocks it has begun.
        block: The block that is open, if there is one.
    """

    path: Path = ()
    prefix: str = ""
    number: str = ""
    frontier: tuple[int, ...] = ()
    blocks: int = 0
    block: OpenBlock | None = None


class SpanGraphBuilder:
    """Takes segments in the order of the text and determines where each belongs.

    Args:
        options: The options of the dialect.
        report: Called for every defect.
        asynchronous: Whether the dialect forks one branch at a time and waits for it later.
        start: The sequence to begin in, by default the trunk.
    """

    def __init__(
        self,
        options: FormatOptions,
        report: DefectReporter,
        *,
        asynchronous: bool,
        start: ParserFrame | None = None,
    ) -> None:
        self.options, self.report, self.asynchronous = options, report, asynchronous
        self.sequences = [start or ParserFrame()]
        # A join by message removes the call from the context of the trunk.
        self.keeps_calls = asynchronous or options.branch_context == "prefix"

    def place(self, segment: Segment, index: int) -> SpanPlacement:
        """Return where the segment that becomes span `index` belongs, and report what does not fit."""
        sequence = self.sequences[-1]
        placement = SpanPlacement(sequence.path, sequence.frontier, segment.label)
        if segment.role in ("text", "body", "fork", "wait"):
            self._check_all_branches_present(sequence, segment)
        match segment.role:
            case "fork":
                self._fork(sequence, segment, index)
            case "header":
                placement = self._header(sequence, segment)
                sequence = self.sequences[-1]
            case "closer":
                self._closer(sequence, segment, index)
            case "lead" if sequence.block:
                sequence.block.fork_parents = [(index,)] * len(sequence.block.fork_parents)
            case "result":
                placement = self._result(sequence, segment)
            case "wait":
                self._wait(sequence, segment)
            case "tail":
                placement = replace(placement, parents=self._tail(sequence, segment))
        if segment.role != "fork" and not (
            segment.role == "closer" and sequence.path != self.sequences[0].path
        ):
            sequence.frontier = (index,)
        return placement

    def end(self, offset: int) -> None:
        """Report a block that is still open where the text ends."""
        block = self.sequences[0].block
        if block and block.pending:
            missing = next(iter(block.pending.values())).number or "the next one"
            self.report("block never closed", offset, offset, f"branch {missing}, which was forked off")

    def _check_all_branches_present(self, sequence: ParserFrame, segment: Segment) -> None:
        """Once one branch of a wait has been read, all others have to follow at once."""
        block = sequence.block
        if block and block.branch_ends and block.pending:
            self.report("missing branch", segment.start, segment.start, "a branch for every fork")
            sequence.frontier, sequence.block = (*sequence.frontier, *block.branch_ends), None

    def _fork(self, sequence: ParserFrame, segment: Segment, index: int) -> None:
        block, options = sequence.block, self.options
        if block is None or not (self.asynchronous and block.pending):
            sequence.blocks += 1
            block = sequence.block = OpenBlock(sequence.blocks)
            if len(sequence.path) // 2 >= options.max_depth:
                self.report(
                    "nested too deep", segment.start, segment.end, f"at most {options.max_depth} levels"
                )
        for outline in segment.outlines:
            expected = f"{sequence.prefix}{options.first_number + block.outline_count}"
            if outline.number and outline.number != expected:
                is_duplicate = block.place_of(outline.number) is not None
                self.report(
                    "duplicate number" if is_duplicate else "missing number",
                    outline.offset,
                    outline.offset + len(outline.number),
                    f'"{expected}"',
                )
            if block.outline_count >= options.max_width:
                self.report(
                    "too many branches",
                    outline.offset,
                    outline.offset + len(outline.number),
                    f"at most {options.max_width} outlines",
                )
            if not outline.number and len(segment.outlines) > 1:  # error recovery inserted the missing number
                outline = outline._replace(number=expected)
            block.add(outline)
            block.fork_parents.append((index,))
        if not segment.outlines:
            block.fork_parents = [(index,)]
        if self.keeps_calls:
            sequence.frontier = (index,)

    def _header(self, sequence: ParserFrame, segment: Segment) -> SpanPlacement:
        block, options = sequence.block, self.options
        if block is None:  # a format whose reply begins with its branches
            if self.asynchronous:
                self.report("branch without a fork", segment.start, segment.end, "one branch for every fork")
            sequence.blocks += 1
            block = sequence.block = OpenBlock(sequence.blocks, [sequence.frontier])
        block.branches_read += 1
        place = block.next_pending()
        outline = None if place is None else block.take(place)
        self._check_header_number(sequence, block, outline, segment)
        if block.branches_read > options.max_width:
            self.report(
                "too many branches", segment.start, segment.end, f"at most {options.max_width} branches"
            )
        last_parents = min(block.branches_read, len(block.fork_parents)) - 1
        parents = block.fork_parents[last_parents] if block.fork_parents else sequence.frontier
        path = (*sequence.path, block.number, block.branches_read)
        prefix = f"{segment.number}." if segment.number else ""
        self.sequences.append(ParserFrame(path, prefix, segment.number))
        return SpanPlacement(path, parents, outline.text if outline else "")

    def _check_header_number(
        self, sequence: ParserFrame, block: OpenBlock, outline: Outline | None, segment: Segment
    ) -> None:
        if block.outline_count:
            if outline is not None and (not segment.number or segment.number == outline.number):
                return
            place = block.place_of(segment.number)
            if place is not None and place < block.branches_read - 1:
                name = "duplicate number"
            else:
                name = "branch without an outline" if outline is None else "missing number"
            self.report(name, segment.start, segment.end, "the branch that is next in the outlines")
            return
        expected = self.options.first_number + block.branches_read - 1
        if segment.number and segment.number != f"{sequence.prefix}{expected}":
            self.report("missing number", segment.start, segment.end, f'"{expected}"')

    def _closer(self, sequence: ParserFrame, segment: Segment, index: int) -> None:
        if segment.number and sequence.number and segment.number != sequence.number:
            self.report("number of the closer", segment.start, segment.end, f'"{sequence.number}"')
        if len(self.sequences) < 2:
            return
        self.sequences.pop()
        outer = self.sequences[-1]
        if outer.block is not None:
            outer.block.branch_ends.append(index)
            if self.asynchronous and not outer.block.pending:
                outer.frontier = (*outer.frontier, *outer.block.branch_ends)
                outer.block = None

    def _result(self, sequence: ParserFrame, segment: Segment) -> SpanPlacement:
        block = sequence.block
        place = block.pending_place(segment.number) if block else None
        if block is None or place is None or (not self.asynchronous and place != block.next_pending()):
            self.report("missing number", segment.start, segment.end, "the branch that is next in the call")
            path = (*sequence.path, sequence.blocks, (block.branches_read if block else 0) + 1)
            return SpanPlacement(path, sequence.frontier, segment.label)
        outline = block.take(place)
        if segment.name and segment.name != outline.text:
            self.report("result of another branch", segment.start, segment.end, outline.text)
        block.branches_read += 1
        path = (*sequence.path, block.number, place + 1)
        if self.asynchronous and not block.pending:
            sequence.block = None
        return SpanPlacement(path, sequence.frontier, segment.label, outline.text)

    def _wait(self, sequence: ParserFrame, segment: Segment) -> None:
        block = sequence.block
        is_known = block is not None and block.pending_place(segment.number) is not None
        if block is None or not block.pending or (segment.number and not is_known):
            expected = f"one of {block.pending_numbers() if block else 'none'}"
            self.report("join without a fork", segment.start, segment.end, expected)

    def _tail(self, sequence: ParserFrame, segment: Segment) -> tuple[int, ...]:
        """The parents of a tail: the ends of all branches."""
        block = sequence.block
        if block is None:
            return sequence.frontier
        if block.pending:
            self.report(
                "missing branch",
                segment.start,
                segment.start,
                f"branch {next(iter(block.pending.values())).number}, which has an outline",
            )
        sequence.block = None
        return tuple(block.branch_ends) if block.branch_ends else sequence.frontier


def build_spans(
    segments: Sequence[Segment],
    text: str,
    ids: Sequence[tuple[int, ...] | None],
    builder: SpanGraphBuilder,
) -> list[Span]:
    """Build the spans of a complete text. All of them count as decoded.

    Args:
        segments: The segments of the text.
        text: The text.
        ids: The token ids of each segment, None where they are unknown.
        builder: Places the segments, and reports defects.
    """
    spans: list[Span] = []
    for index, (segment, token_ids) in enumerate(zip(segments, ids, strict=True)):
        placement = builder.place(segment, index)
        spans.append(
            Span(
                role=segment.role,
                origin="decoded",
                text=text[segment.start : segment.end],
                token_ids=token_ids,
                parents=placement.parents,
                path=placement.path,
                label=placement.label,
                outline=placement.outline,
                finish="stop" if segment.role == "closer" else None,
            )
        )
    builder.end(len(text))
    return spans
