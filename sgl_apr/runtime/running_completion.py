"""A completion while it is decoded, for what ends it early by what it has written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sgl_apr.engine.base import Engine, Request
from sgl_apr.engine.sglang_request import INTERVAL_PARAM
from sgl_apr.runtime.detokenizer import IncrementalDetokenizer
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.calls import TopLogprobs

CHUNK_TOKENS = 4  # of a request that is watched: what is to end it is noticed so late
Watch = Callable[["RunningCompletion"], None]


@dataclass(eq=False)
class RunningCompletion:
    """A completion that a function watches: it is called after each chunk.

    Attributes:
        sequence: What decodes.
        text: What was decoded so far.
        top_logprobs: For each token so far the most likely ones in its place, if they were requested.
    """

    sequence: SequenceState
    text: str = ""
    top_logprobs: list[TopLogprobs] = field(default_factory=list)

    def cut(self, limit: str) -> None:
        """End it here. It keeps what it has written, with the finish "aborted".

        Args:
            limit: What ended it, as `Trajectory.limits` names it.
        """
        self.sequence.scope.cancel("aborted", limit)


def watched_request(
    engine: Engine,
    watch: Watch,
    request: Request,
    stream: IncrementalDetokenizer,
    sequence: SequenceState,
    before: RunningCompletion | None = None,
) -> Request:
    """Let a function watch what a request decodes, in chunks that are not larger than `CHUNK_TOKENS` if the engine can.

    Args:
        engine: Where the request will be sent.
        watch: The function.
        request: The request.
        stream: The text of the request.
        sequence: What decodes.
        before: What an earlier request of the sequence has decoded, which the function sees too.

    Returns:
        The request to send in its place.
    """
    text, top_logprobs = (before.text, before.top_logprobs) if before else ("", [])
    running, emit = RunningCompletion(sequence, text, [*top_logprobs]), stream.emit

    def receive(new: str) -> None:
        if emit:
            emit(new)
        start = len(text) + stream.emitted_chars - len(new)  # one that is repeated begins again
        running.text = running.text[:start] + new
        watch(running)

    def receive_top_logprobs(tokens: Sequence[TopLogprobs]) -> None:
        running.top_logprobs[len(top_logprobs) + len(stream.received_ids) :] = tokens

    stream.emit = receive
    default = getattr(engine, "default_interval", None)  # None where a request cannot set it
    if default is not None and default > CHUNK_TOKENS:
        request = replace(request, sampling={INTERVAL_PARAM: CHUNK_TOKENS, **request.sampling})
    return replace(request, on_top_logprobs=receive_top_logprobs) if request.top_logprobs else request
