"""DeepConf: replies that the model is not sure of end early, and the others vote by how sure it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.prompt import Completion
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import SampledTask, Task, require_family
from sgl_apr.methods.voting import vote
from sgl_apr.runtime.running_completion import RunningCompletion
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.confidence import Confidence, GroupConfidence, token_confidences, trace_confidence

TOP_LOGPROBS = 20
LOWEST_GROUP: Confidence = "lowest_group"


async def deepconf(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    n: int = 512,
    warmup: int = 16,
    keep: float = 0.1,
    consensus: float = 0.95,
    window: int = 2048,
    parallelism: int = 16,
    temperature: float = 0.7,
    **options: Any,
) -> MethodResult:
    """Deep Think with Confidence, online (Fu 2025, arXiv 2508.15260, algorithm 2).

    The first replies are complete. The confidence that the surest of them reach is the threshold: a later reply ends as soon
    as the mean confidence of its last tokens is below it, and replies below it have no vote. The vote of the others counts as
    much as their lowest group confidence. Sampling ends when one answer has nearly all of the vote.

    Args:
        engine: The engine that decodes. It returns the most likely tokens in each place.
        problem: A problem of the task.
        task: A `SampledTask`.
        n: Number of replies at most (512 in the paper); fewer if the budget cannot pay for them.
        warmup: How many of them are complete (16 in the paper).
        keep: Share of those whose confidence the others have to reach: 0.1 is the paper's DeepConf-low, 0.9 its DeepConf-high.
        consensus: Share of the vote that ends sampling (0.95 in the paper).
        window: Tokens of a group (2,048 in the paper).
        parallelism: How many replies run at once after the warm-up.
        temperature: Sampling temperature.
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `SampledTask`.
    """
    for name, value in (("n", n), ("warmup", warmup), ("window", window), ("parallelism", parallelism)):
        if value < 1:
            raise AprError(f"{name}={value}, expected at least 1")
    for name, share in (("keep", keep), ("consensus", consensus)):
        if not 0 < share <= 1:
            raise AprError(f"{name}={share}, expected a share above 0, and 1 at most")
    prompt = require_family(task, SampledTask).prompt(problem)
    options = {"logprobs": True, "top_logprobs": TOP_LOGPROBS, **options, "temperature": temperature}
    async with method_session(engine, prompt, "deepconf", **options) as session:
        width = session.affordable_width(n, task.max_tokens)
        first = min(warmup, width)
        sampled = prompt.without_text
        replies = await session.fork(session.root, [sampled] * first, share=first / width)
        threshold = _threshold([_confidence(reply, window) for reply in replies], keep)

        def has_consensus(more: Sequence[Completion]) -> bool:
            votes = Counter[Hashable]()
            for answer, weight in _ballots(task, [*replies, *more], threshold, window):
                if answer:
                    votes[task.vote_key(answer)] += weight  # type: ignore[assignment]
            return bool(votes) and max(votes.values()) >= consensus * sum(votes.values())

        if width > first and not has_consensus([]):
            watched = replace(sampled, watch=_Cutter(threshold, window).watch)
            replies += await session.fork(
                session.root, [watched] * (width - first), is_enough=has_consensus, parallelism=parallelism
            )
        ballots = _ballots(task, replies, threshold, window)
        answer, score = vote(task, [answer for answer, _ in ballots], [weight for _, weight in ballots])
        return MethodResult("deepconf", answer, session.finish(), score)


def _confidence(reply: Completion, window: int) -> float:
    return trace_confidence(token_confidences(reply.top_logprobs), LOWEST_GROUP, window) or 0.0


def _threshold(confidences: Sequence[float], keep: float) -> float:
    """The percentile that this share of the replies is above, interpolated as in the published code."""
    return float(np.percentile(confidences, 100 * (1 - keep)))


def _ballots(
    task: Task[Any], replies: Sequence[Completion], threshold: float, window: int
) -> list[tuple[str, float]]:
    """The answers of the replies that reach the threshold, with their weights."""
    confidences = [(reply, _confidence(reply, window)) for reply in replies if reply.finish != "aborted"]
    return [(task.answer(reply.text), value) for reply, value in confidences if value >= threshold]


class _Cutter:
    """Ends replies whose group confidence falls below a threshold."""

    def __init__(self, threshold: float, window: int) -> None:
        self._threshold, self._window = threshold, window
        self._groups = dict[SequenceState, tuple[GroupConfidence, int]]()

    def watch(self, running: RunningCompletion) -> None:
        group, seen = self._groups.get(running.sequence, (GroupConfidence(self._window), 0))
        if seen > len(running.top_logprobs):  # the request was repeated
            group, seen = GroupConfidence(self._window), 0
        lowest = group.add(running.top_logprobs[seen:])
        self._groups[running.sequence] = group, len(running.top_logprobs)
        if lowest is not None and lowest < self._threshold:
            running.cut("confidence")
