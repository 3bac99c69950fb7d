"""What one phase of a reply can write: where its decoding stops, and the numbers of branches in it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from sgl_apr.formats.completion import NumberOf
from sgl_apr.formats.grammar import Grammar
from sgl_apr.formats.graph_builder import OpenBlock, ParserFrame, SpanGraphBuilder
from sgl_apr.formats.options import BranchNumbering, FormatOptions, Phase
from sgl_apr.formats.segmenter import Outline, Segment, raise_on_defect

UNNUMBERED_ROLES = ("text", "body", "close")


def check_phase_numbers(
    options: FormatOptions,
    segments: Sequence[Segment],
    text: str,
    numbering: BranchNumbering,
    *,
    asynchronous: bool,
) -> None:
    """Check that a phase writes the numbers that come next.

    Args:
        options: The options of the dialect.
        segments: The segments of the phase.
        text: Its text.
        numbering: The numbers that it can write.
        asynchronous: Whether the dialect forks one branch at a time and waits for it later.

    Raises:
        TraceError: A number is wrong, or there are more branches than the dialect allows.
    """
    for segment in segments:
        if segment.role not in UNNUMBERED_ROLES and (segment.number or segment.role != "closer"):
            break
    else:  # as in most phases: nothing to check
        return
    sequence = ParserFrame(prefix=numbering.prefix, number=numbering.number)
    if asynchronous and numbering.number:
        block = OpenBlock(1)
        for number in map(str, range(options.first_number, int(numbering.number))):
            block.add(Outline(number, "", 0), is_pending=number in numbering.waiting)
        sequence.block = block if block.pending else None
    builder = SpanGraphBuilder(options, raise_on_defect(text), asynchronous=asynchronous, start=sequence)
    for index, segment in enumerate(segments):
        builder.place(segment, index)


def number_in_completion(grammar: Grammar, first_number: int, numbering: BranchNumbering) -> NumberOf:
    """Return a function that gives the next number of a phase that is completed.

    Args:
        grammar: The grammar.
        first_number: The number of the first branch.
        numbering: The numbers that the phase can write.
    """

    def number(count: int, previous: str) -> str:
        if previous and previous == grammar.opening_literal("wait"):
            return numbering.waiting[0] if numbering.waiting else str(first_number)
        after_closer = previous == grammar.opening_literal("closer")
        in_fork = grammar.has_repetition("fork") and not after_closer
        return (not in_fork and numbering.number) or f"{numbering.prefix}{first_number + count}"

    return number


@lru_cache(maxsize=1024)  # called for every request
def phase_stop_strings(
    grammar: Grammar, phase: Phase, rule: str, numbering: BranchNumbering
) -> tuple[str, ...]:
    """Return the texts at which decoding of a phase stops: the ends of a fork, of a wait, or of the branch.

    Args:
        grammar: The grammar.
        phase: The phase.
        rule: Its rule.
        numbering: The numbers that it can write.
    """
    stops: list[str] = []
    if phase in ("branch", "rejoin"):
        stops.append(grammar.closing_literal("body", numbering.number))
    if rule != "body":
        stops.append(grammar.closing_literal("fork", numbering.number))
        stops += [grammar.closing_literal("wait", n) for n in numbering.waiting]
    return tuple(dict.fromkeys(s for s in stops if s))
