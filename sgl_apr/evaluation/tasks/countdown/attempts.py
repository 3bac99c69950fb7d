"""A served model on Countdown: trajectories of many problems at once, and what became of them; nothing is trained."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.evaluation.tasks.countdown.problems import Problem, solves
from sgl_apr.evaluation.tasks.countdown.search import extract_solution
from sgl_apr.formats.dialects import Dialect
from sgl_apr.methods.session import gather
from sgl_apr.runtime.loop import areason
from sgl_apr.trajectory.trajectory import Trajectory

# How a server is started that answers many at once while nobody reads along: room for what they hold, and few words
# for many tokens, which is half of the processor time of its front and of ours.
SERVER_OPTIONS: dict[str, Any] = {"max_total_tokens": 131072, "stream_interval": 32}


@dataclass(frozen=True, slots=True)
class Attempt:
    """A problem and what a model did with it."""

    problem: Problem
    trajectory: Trajectory

    @property
    def correct(self) -> bool:
        """Whether it ends with a right solution."""
        return solves(self.problem, final_solution(self.trajectory))


def final_solution(trajectory: Trajectory) -> str:
    """The solution that a reply ends with; empty if it ends with none."""
    return extract_solution(trajectory.answer)


async def attempt_problems(
    engine: Engine,
    problems: Sequence[Problem],
    dialect: Dialect | str | None,
    *,
    at_once: int = 512,
    width: int | None = None,
    **options: Any,
) -> list[Attempt]:
    """One attempt at each of the problems, in their order; options are those of `areason`, and so are errors.

    `width` is stated in the prompts, for a model that has learned to heed it.
    """
    gate = asyncio.Semaphore(at_once)

    async def one(problem: Problem) -> Attempt:
        async with gate:
            return Attempt(problem, await areason(engine, problem.prompt(width), dialect, **options))

    return await gather(map(one, problems))
