"""Samples whose weak ones end early: a scorer judges them while they are written, and the strong ones get their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.prompt import Completion
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import SampledTask, Task, require_family
from sgl_apr.runtime.branch_group import first_error
from sgl_apr.runtime.branch_judge import BranchJudge
from sgl_apr.runtime.branch_scoring import BranchScoring, Scorer


async def value_guided(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    n: int = 8,
    scorer: Scorer | Literal["confidence"] = "confidence",
    border: str = "\n",
    keep: float = 0.5,
    threshold: float | None = None,
    timeout: float = 10.0,
    temperature: float = 0.7,
    **options: Any,
) -> MethodResult:
    """Sample `n` replies, and let a scorer end the weak ones at the borders of their thoughts (after Gambit, arXiv 2608.08020,
    whose own engine this does not need).

    At each border a tournament is held: as soon as all replies that still run have reached the border, the worse ones end. What they have
    not written of their tokens is for the others. The answer is that of the complete reply with the best score. A
    score that fails, is late, or is no number ends nothing.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `SampledTask`.
        n: Number of replies; fewer if the budget cannot pay for them.
        scorer: A function of the problem and what a reply has so far, such as `RewardModel`: higher is better. "confidence" takes
            how sure the model is of its tokens (`trace_confidence`), and asks nobody.
        border: The text that ends a thought.
        keep: Share of the running replies that stay at each border.
        threshold: End replies below this score instead, without a tournament.
        timeout: Seconds that a score may take.
        temperature: Sampling temperature.
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `SampledTask`.
    """
    if n < 1:
        raise AprError(f"n={n}, expected at least 1")
    scoring = BranchScoring(scorer, border, keep, threshold, timeout)
    prompt = require_family(task, SampledTask).prompt(problem)
    options = {**options, "temperature": temperature}
    options = {**scoring.request_options, **options}
    async with method_session(engine, prompt, "value_guided", **options) as session:
        width = session.affordable_width(n, task.max_tokens)
        try:
            async with asyncio.TaskGroup() as tasks:
                judge = BranchJudge(tasks, scoring, problem, expected=width)

                def note_ended(ended: Sequence[Completion]) -> bool:
                    for completion in ended:
                        judge.note_ended(completion.sequence, complete=completion.is_complete)
                    return False  # whatever has ended, the others go on

                watched = replace(prompt.without_text, watch=judge.watch)
                replies = await session.fork(session.root, [watched] * width, is_enough=note_ended)
                judge.stop()
        except BaseExceptionGroup as failed:
            error = first_error(failed)
            raise error from error.__cause__
        complete = [c for c in replies if c.finish not in ("aborted", "failed") and task.answer(c.text)]
        final = await asyncio.gather(*(scoring.score(problem, c.text, c.top_logprobs) for c in complete))
        best = max(zip(complete, final, strict=True), key=_by_score, default=None)
        answer, score = (task.answer(best[0].text), best[1]) if best else ("", None)
        return MethodResult("value_guided", answer, session.finish(), score, "gambit-style")


def _by_score(scored: tuple[Completion, float | None]) -> float:
    return float("-inf") if scored[1] is None else scored[1]
