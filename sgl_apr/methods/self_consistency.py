"""Several chains of thought in parallel, and a vote on their answers, which may end before all chains have been sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp
from typing import Any, Literal, get_args

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.prompt import Completion
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import SampledTask, Task, require_family
from sgl_apr.methods.vote_stopping import Ballot, Stop, settled_probability
from sgl_apr.methods.voting import vote
from sgl_apr.trajectory.confidence import Confidence, token_confidences, trace_confidence

Weight = Literal["confidence"]
TOP_LOGPROBS = 20  # of each token (DeepConf, arXiv 2508.15260, section 4.1)
PARALLELISM = 8  # chains at once while the vote may end early: those that run then are lost


async def self_consistency(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    n: int = 40,
    stop: Stop | None = None,
    threshold: float = 0.95,
    parallelism: int | None = None,
    weight: Weight | None = None,
    confidence: Confidence = "lowest_group",
    window: int = 2048,
    temperature: float = 0.7,
    **options: Any,
) -> MethodResult:
    """Sample `n` chains and return the answer with the most votes (Wang 2022, arXiv 2203.11171, section 2).

    By default the vote is the paper's unweighted one, after all chains. On a tie, the answer of the earliest chain wins.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `SampledTask`.
        n: Number of chains (40 in the paper, section 3.1); fewer if the budget cannot pay for them.
        stop: When the vote ends early: as soon as the probability that its leader wins reaches the threshold. "beta" and
            "dirichlet" compute it from the votes (Adaptive-Consistency, arXiv 2305.11860), "cges" also from the probability of
            each reply, which is the geometric mean of that of its tokens (CGES, arXiv 2511.02603). Chains that run then are
            cut, and those that wait are never sent.
        threshold: That probability (0.95 in arXiv 2305.11860, section 4.1).
        parallelism: How many chains run at once; by default 8 if the vote may end early, otherwise all.
        weight: "confidence" lets a vote count as much as its reply is sure (DeepConf, arXiv 2508.15260, section 3).
        confidence: How that is computed from the log-probabilities of the reply (`trace_confidence`).
        window: Tokens of a group for that.
        temperature: Sampling temperature (0.7 in the paper, section 3.1).
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `SampledTask`.
    """
    for name, value, values in (
        ("stop", stop, Stop),
        ("weight", weight, Weight),
        ("confidence", confidence, Confidence),
    ):
        if value is not None and value not in get_args(values):
            raise AprError(f"{name}={value!r}, expected one of {', '.join(get_args(values))}")
    if not 0 < threshold <= 1:
        raise AprError(f"threshold={threshold}, expected a probability")
    if window < 1 or (parallelism is not None and parallelism < 1):
        raise AprError(f"window={window}, parallelism={parallelism}, expected at least 1")
    prompt = require_family(task, SampledTask).prompt(problem)
    options = {**options, "temperature": temperature}
    if weight:
        options = {"logprobs": True, "top_logprobs": TOP_LOGPROBS, **options}
    is_enough = vote_is_settled(task, stop, threshold) if stop else None
    async with method_session(engine, prompt, "self_consistency", **options) as session:
        width = session.affordable_width(n, task.max_tokens)
        completions = await session.fork(
            session.root,
            [prompt.without_text] * width,
            is_enough=is_enough,
            parallelism=parallelism or (PARALLELISM if stop else None),
        )
        voters = [c for c in completions if c.finish != "aborted"]  # a vote that ended early has cut these
        weights = [_weight(c, confidence, window) for c in voters] if weight else None
        answer, share = vote(task, [task.answer(c.text) for c in voters], weights)
        return MethodResult("self_consistency", answer, session.finish(), share)


def vote_is_settled(
    task: Task[Any], stop: Stop, threshold: float = 0.95
) -> Callable[[Sequence[Completion]], bool]:
    """A condition for `MethodSession.fork`: the leader of the vote on the answers wins with that probability.

    Args:
        task: Reads the answers, and decides which are equal.
        stop: How the probability is computed.
        threshold: The probability.
    """

    def is_settled(completions: Sequence[Completion]) -> bool:
        ballots = [
            Ballot(task.vote_key(answer), 0.5 if c.logprob is None else exp(c.logprob))
            for c in completions
            if (answer := task.answer(c.text))
        ]
        return settled_probability(stop, ballots) >= threshold

    return is_settled


def _weight(completion: Completion, kind: Confidence, window: int) -> float:
    """What the vote of a reply counts; nothing if none of its tokens was a decision."""
    return max(0.0, trace_confidence(token_confidences(completion.top_logprobs), kind, window) or 0.0)
