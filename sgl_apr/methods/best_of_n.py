"""Several replies at once, of which a verifier chooses: a function, a served reward model, or the model itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from inspect import isawaitable
from math import isfinite
from typing import Any, Literal, get_args

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError, EngineError
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import MethodSession, gather, method_session
from sgl_apr.methods.task import Task

Verifier = Callable[[Any, str], float | Awaitable[float]]
Select = Literal["argmax", "weighted"]


async def best_of_n(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any, Any],
    n: int = 100,
    verifier: Verifier | Literal["judge"] | None = None,
    select: Select = "argmax",
    temperature: float = 0.7,
    **options: Any,
) -> MethodResult:
    """Sample `n` replies and take the answer that a verifier thinks best (Cobbe 2021, arXiv 2110.14168, section 4.2).

    n: 100 replies at T = 0.7 are the paper's; a budget that does not bear as many has fewer. verifier: gets the
    problem and a whole reply; `RewardModel` is one. "judge" asks the model, in a fork behind each reply (Kadavath
    2022, arXiv 2207.05221, section 3). None is the task's own check where that needs the problem only, else a judge.
    select: "argmax" takes the highest score, "weighted" the answer with the highest sum of scores, which are then 0
    or more (Li 2022, arXiv 2206.02336, section 3.2). Of equals it is the first. A reply that could not be scored is
    not chosen.
    """
    if select not in get_args(Select):
        raise AprError(f'select={select!r}, expected "argmax" or "weighted"')
    if verifier is None:
        verifier = _checked(task) if task.verifiable else "judge"
    judge = task.judge(problem) if verifier == "judge" else None
    cost = len(engine.tokenizer.encode(judge.text)) + (judge.tokens or task.step) if judge else 0
    ask = task.ask(problem)
    options = {**options, "temperature": temperature}
    async with method_session(engine, ask.text, "best_of_n", **options) as thoughts:
        paths = thoughts.affordable_width(n, task.max_tokens + cost, calls=2 if judge else 1)
        of = task.max_tokens / (task.max_tokens + cost)
        found = await thoughts.fork(thoughts.root, [ask.without_text] * paths, of=of)
        said = [(t, answer) for t in found if t.finish != "failed" and (answer := task.answer(t.text))]
        replies = [thought for thought, _ in said]
        if judge:
            scores = await _judged(thoughts, task, judge, replies)
        else:
            assert callable(verifier)
            scores = await _scored(thoughts, verifier, problem, replies)
        votes: dict[Hashable, list[tuple[float, str]]] = {}
        for (_, answer), score in zip(said, scores, strict=True):
            if score is not None:
                votes.setdefault(task.vote_key(answer), []).append((_valid(score, select), answer))
        worth = {key: _worth([score for score, _ in own], select) for key, own in votes.items()}
        best = max(worth, key=worth.__getitem__, default=None)
        _, answer = max(votes.get(best, [(0.0, "")]), key=lambda vote: vote[0])
        return MethodResult("best_of_n", answer, thoughts.finish(), worth.get(best))


def _worth(scores: list[float], select: Select) -> float:
    return sum(scores) if select == "weighted" else max(scores)


def _valid(score: float, select: Select) -> float:
    if not isfinite(score) or (select == "weighted" and score < 0):
        what = "0 or more, as its vote is weighted" if select == "weighted" else "a number"
        raise AprError(f"the verifier says {score}, expected {what}")
    return score


def _checked(task: Task[Any, Any]) -> Verifier:
    return lambda problem, text: float(bool(task.verify(problem, task.answer(text))))


async def _judged(
    thoughts: MethodSession, task: Task[Any, Any], judge: Prompt, replies: list[Completion]
) -> list[float | None]:
    """What the model says of each, in a fork behind it."""
    left = len(replies)
    forks = [thoughts.fork(reply, [judge], of=1 / (left - k)) for k, reply in enumerate(replies)]
    said = [thought for (thought,) in await gather(forks)]
    return [task.judge_score(thought) if thought.text else None for thought in said]


async def _scored(
    thoughts: MethodSession, verifier: Verifier, problem: Any, replies: list[Completion]
) -> list[float | None]:
    """What a verifier says of each; None where it failed. Raises its error if it failed for all of them."""
    errors = list[EngineError]()

    async def score(text: str) -> float | None:
        try:
            said = verifier(problem, text)
            return float(await said if isawaitable(said) else said)
        except EngineError as error:
            if thoughts.requests.plan.on_branch_failure == "raise":
                raise
            errors.append(error)
            return None

    scores = await gather(thoughts.run_until_deadline(score(reply.text)) for reply in replies)
    if errors and len(errors) == len(replies):
        raise errors[0]
    return scores
