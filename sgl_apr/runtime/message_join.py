"""The join by message: what a branch returns to the sequence that forked it, and how that is written there."""

from __future__ import annotations

from collections.abc import Sequence

from sgl_apr.formats.branch_prompts import branch_prompt
from sgl_apr.formats.completion import PLACEHOLDER
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.phase_output import FAILURE_NOTE
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.sequence import SequenceState


def make_branch_prompt(
    record: TrajectoryRecorder, dialect: Dialect, sequence: SequenceState, outline: str, most: int
) -> str:
    """What a branch of `sequence` is told, in at most so many tokens: they come out of the branch's share."""
    text = branch_prompt(dialect.branch_prompt).make_prompt(
        record.tokenizer.decode(sequence.context), outline
    )
    return truncate_tokens(record, text, most) or PLACEHOLDER


def truncate_tokens(record: TrajectoryRecorder, text: str, most: int) -> str:
    """`text`, or its first `most` tokens."""
    ids = record.tokenizer.encode(text)
    return text if len(ids) <= most else record.tokenizer.decode(ids[:most])


def remove_call_from_context(record: TrajectoryRecorder, sequence: SequenceState) -> None:
    """Go on from before the call, which may be in two pieces; it stays in the record."""
    while (span := record.spans[sequence.frontier[0]]).role == "fork":
        sequence.frontier = span.parents
        sequence.context = sequence.context[: len(sequence.context) - span.tokens]


def write_results(
    record: TrajectoryRecorder,
    dialect: Dialect,
    sequence: SequenceState,
    branches: Sequence[SequenceState],
    most: int,
) -> int:
    """Write what branches returned, each behind its own end in time. Returns the new tokens."""
    grammar, before = dialect.grammar, len(sequence.context)
    record.inject(sequence, "lead", grammar.render_rule("lead"))
    for branch in branches:
        answer = _answer(record, dialect, branch, most)
        rule = "failure" if not answer and "failure" in grammar.rules else "result"
        text = grammar.render_rule(rule, branch.number, answer, branch.outline)
        sequence.waits_for = branch.frontier
        record.inject(
            sequence, "result", text, label=answer.strip(), path=branch.path, outline=branch.outline
        )
        sequence.waits_for = ()
    record.inject(sequence, "tail", grammar.render_rule("tail"))
    return len(sequence.context) - before


def _answer(record: TrajectoryRecorder, dialect: Dialect, branch: SequenceState, most: int) -> str:
    """What a branch says to the one that forked it; nothing if it was cut before it had said it."""
    grammar = dialect.grammar
    if record.finish_reason_of(branch) == "failed" and "failure" not in grammar.rules:
        return truncate_tokens(record, FAILURE_NOTE, most)
    spans = [s for s in record.spans_of(branch) if s.path == branch.path]
    closers = [s for s in spans if s.role == "closer"]
    if grammar.closing_literal("body", branch.number):
        text = closers[0].label if closers and all(s.origin == "decoded" for s in closers) else ""
    else:
        body = "".join(s.text for s in spans if s.role == "body" and s.origin == "decoded")
        text = branch_prompt(dialect.branch_prompt).extract_result(body)
    text = truncate_tokens(record, text, most)
    return text if not any(mark in text for mark in grammar.tag_literals) else ""
