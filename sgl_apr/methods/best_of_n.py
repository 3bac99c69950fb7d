"""Best of N: several replies in parallel, and the best one by a verifier: a function, a reward model, or the model itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from inspect import isawaitable
from math import isfinite
from typing import Any, Literal, get_args

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError, EngineError
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import MethodSession, method_session
from sgl_apr.methods.task import SampledTask, SelfJudgedTask, Task, require_family
from sgl_apr.runtime.branch_group import gather
from sgl_apr.runtime.value_checks import shorten

Verifier = Callable[[Any, str], float | Awaitable[float]]
Select = Literal["argmax", "weighted"]


async def best_of_n(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    n: int = 100,
    verifier: Verifier | Literal["judge"] | None = None,
    select: Select = "argmax",
    temperature: float = 0.7,
    **options: Any,
) -> MethodResult:
    """Sample `n` replies and return the answer that a verifier scores best (Cobbe 2021, arXiv 2110.14168, section 4.2).

    On a tie, the earliest answer wins. Replies whose score failed are not chosen.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `SampledTask`, and a `SelfJudgedTask` if the model is the verifier.
        n: Number of replies (100 in the paper); fewer if the budget cannot pay for them.
        verifier: A function of the problem and a complete reply, such as `RewardModel`. "judge" asks the model itself,
            in a fork after each reply (Kadavath 2022, arXiv 2207.05221, section 3). None is the task's own `verify`
            where the task is verifiable, else "judge".
        select: "argmax" takes the highest score, "weighted" the answer with the highest sum of scores, which then have
            to be 0 or more (Li 2022, arXiv 2206.02336, section 3.2).
        temperature: Sampling temperature (0.7 in the paper).
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is not of the required kind.
        EngineError: The verifier's error, if it failed for every reply.
    """
    if select not in get_args(Select):
        raise AprError(f'select={select!r}, expected "argmax" or "weighted"')
    if verifier is None:
        verifier = _own_verifier(task) if task.verifiable else "judge"
    if verifier != "judge" and not callable(verifier):
        raise AprError(
            f'verifier={shorten(verifier)}, expected a function of the problem and a reply, or "judge"'
        )
    judge = require_family(task, SelfJudgedTask).judge_prompt(problem) if verifier == "judge" else None
    cost = len(engine.tokenizer.encode(judge.text)) + (judge.tokens or task.step_tokens) if judge else 0
    prompt = require_family(task, SampledTask).prompt(problem)
    options = {**options, "temperature": temperature}
    async with method_session(engine, prompt, "best_of_n", **options) as session:
        width = session.affordable_width(n, task.max_tokens + cost, calls=2 if judge else 1)
        share = task.max_tokens / (task.max_tokens + cost)
        samples = await session.fork(session.root, [prompt.without_text] * width, share=share)
        answered = [(c, answer) for c in samples if c.finish != "failed" and (answer := task.answer(c.text))]
        replies = [completion for completion, _ in answered]
        if judge:
            scores = await _judge(session, require_family(task, SelfJudgedTask), judge, replies)
        else:
            assert callable(verifier)
            scores = await _verify(session, verifier, problem, replies)
        votes: dict[Hashable, list[tuple[float, str]]] = {}
        for (_, answer), score in zip(answered, scores, strict=True):
            if score is not None:
                votes.setdefault(task.vote_key(answer), []).append((_checked(score, select), answer))
        totals = {key: _total([score for score, _ in own], select) for key, own in votes.items()}
        best = max(totals, key=totals.__getitem__, default=None)
        _, answer = max(votes.get(best, [(0.0, "")]), key=lambda vote: vote[0])
        return MethodResult("best_of_n", answer, session.finish(), totals.get(best))


def _total(scores: list[float], select: Select) -> float:
    return sum(scores) if select == "weighted" else max(scores)


def _checked(score: float, select: Select) -> float:
    if not isfinite(score) or (select == "weighted" and score < 0):
        expected = "0 or more, because its vote is weighted" if select == "weighted" else "a number"
        raise AprError(f"the verifier returned {score}, expected {expected}")
    return score


def _own_verifier(task: Task[Any]) -> Verifier:
    return lambda problem, text: float(bool(task.verify(problem, task.answer(text))))


async def _judge(
    session: MethodSession, task: SelfJudgedTask[Any], judge: Prompt, replies: list[Completion]
) -> list[float | None]:
    """The model's score of each reply, decoded in a fork after it; None if it is empty."""
    left = len(replies)
    forks = [session.fork(reply, [judge], share=1 / (left - k)) for k, reply in enumerate(replies)]
    judgements = [completion for (completion,) in await gather(forks)]
    return [task.judge_score(completion) if completion.text else None for completion in judgements]


async def _verify(
    session: MethodSession, verifier: Verifier, problem: Any, replies: list[Completion]
) -> list[float | None]:
    """The verifier's score of each reply; None where it failed. Raises its error if it failed for all replies."""
    errors = list[EngineError]()

    async def score(text: str) -> float | None:
        try:
            result = verifier(problem, text)
            return float(await result if isawaitable(result) else result)
        except EngineError as error:
            if session.requests.options.on_branch_failure == "raise":
                raise
            errors.append(error)
            return None

    scores = await gather(
        session.root.sequence.scope.run_until_cancelled(score(reply.text)) for reply in replies
    )
    if errors and len(errors) == len(replies):
        raise errors[0]
    return scores
