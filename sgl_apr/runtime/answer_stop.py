"""Ends the request that decodes the final text once it has written a stop text."""

from __future__ import annotations

from sgl_apr.formats.dialects import Phase
from sgl_apr.runtime.detokenizer import IncrementalDetokenizer
from sgl_apr.runtime.fork_rules import PhaseLimits
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.runtime.tools.rules import CallLimits


def watch_for_stop(
    text: IncrementalDetokenizer,
    options: ReasonOptions,
    sequence: SequenceState,
    phase: Phase,
    limits: PhaseLimits,
    calls: CallLimits | None,
) -> None:
    """Let a request end when its text is an answer with a stop text in it.

    It is an answer if it is the trunk's, and can neither fork nor call a tool. Otherwise that is known only when the request
    has ended. A request that records log-probabilities is not ended, since it would have none.

    Args:
        text: The text of the request, which is watched.
        options: Of the trajectory.
        sequence: The sequence.
        phase: The phase that the request decodes.
        limits: Its bounds.
        calls: The calls of tools that it may end with.
    """
    may_continue = limits.fork != "forbidden" or sequence.pending_count or (calls and calls.max_calls)
    if not options.stop or sequence.path or may_continue or options.logprobs:
        return
    grammar = options.dialect.grammar
    follows_close = phase == "after" and not (calls and calls.resumed) and "close" in grammar.rules
    close = grammar.closing_literal("close") if follows_close else ""
    emit, written = text.emit, ""

    def watch(new: str) -> None:
        nonlocal written
        if emit:
            emit(new)
        start = text.emitted_chars - len(new)
        written = written[:start] + new  # a request that is repeated writes its text again
        answer = written.partition(close)[2] if close else written
        if any(stop in answer for stop in options.stop):
            sequence.scope.cancel("stop")

    text.emit = watch
