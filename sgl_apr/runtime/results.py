"""The join by message: what a branch returns to the strand that forked it, and how that is written there."""

from __future__ import annotations

from collections.abc import Sequence

from sgl_apr.completion import FILLER
from sgl_apr.dialects import Dialect
from sgl_apr.messages import brief
from sgl_apr.runtime.record import Record, Strand
from sgl_apr.runtime.steps import FAILED


def told(record: Record, dialect: Dialect, strand: Strand, outline: str, most: int) -> str:
    """What a branch of `strand` is told, in at most so many tokens: they come out of the branch's share."""
    text = brief(dialect.brief).tell(record.tokenizer.decode(strand.context), outline)
    return shortened(record, text, most) or FILLER


def shortened(record: Record, text: str, most: int) -> str:
    """`text`, or its first `most` tokens."""
    ids = record.tokenizer.encode(text)
    return text if len(ids) <= most else record.tokenizer.decode(ids[:most])


def drop_call(record: Record, strand: Strand) -> None:
    """Go on from before the call, which may be in two pieces; it stays in the record."""
    while (span := record.spans[strand.tip[0]]).role == "fork":
        strand.tip = span.parents
        strand.context = strand.context[: len(strand.context) - span.tokens]


def write_results(
    record: Record, dialect: Dialect, strand: Strand, branches: Sequence[Strand], most: int
) -> int:
    """Write what branches returned, each behind its own end in time. Returns the new tokens."""
    grammar, before = dialect.grammar, len(strand.context)
    record.inject(strand, "lead", grammar.written("lead"))
    for branch in branches:
        answer = _answer(record, dialect, branch, most)
        rule = "failure" if not answer and "failure" in grammar.rules else "result"
        text = grammar.written(rule, branch.number, answer, branch.outline)
        strand.after = branch.tip
        record.inject(strand, "result", text, label=answer.strip(), path=branch.path, outline=branch.outline)
        strand.after = ()
    record.inject(strand, "tail", grammar.written("tail"))
    return len(strand.context) - before


def _answer(record: Record, dialect: Dialect, branch: Strand, most: int) -> str:
    """What a branch says to the one that forked it; nothing if it was cut before it had said it."""
    grammar = dialect.grammar
    if record.finish_of(branch) == "failed" and "failure" not in grammar.rules:
        return shortened(record, FAILED, most)
    spans = [s for s in record.of(branch) if s.path == branch.path]
    closers = [s for s in spans if s.role == "closer"]
    if grammar.ending("body", branch.number):
        text = closers[0].label if closers and all(s.origin == "decoded" for s in closers) else ""
    else:
        body = "".join(s.text for s in spans if s.role == "body" and s.origin == "decoded")
        text = brief(dialect.brief).answer(body)
    text = shortened(record, text, most)
    return text if not any(mark in text for mark in grammar.marks) else ""
