"""Attempts of a served model at many Countdown problems at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.evaluation.tasks.countdown.problems import Problem, solves
from sgl_apr.evaluation.tasks.countdown.search import extract_solution
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.branch_group import gather
from sgl_apr.runtime.loop import areason
from sgl_apr.trajectory.trajectory import Trajectory

# Options of a server for many requests at once whose output nobody watches: room for their contexts, and few messages for
# many tokens, since a message per token takes half of the processor time of the server's front end and of ours.
SERVER_OPTIONS: dict[str, Any] = {"max_total_tokens": 131072, "stream_interval": 32}


@dataclass(frozen=True, slots=True)
class Attempt:
    """A problem, and the trajectory of a model that tried to solve it."""

    problem: Problem
    trajectory: Trajectory

    @property
    def correct(self) -> bool:
        """Whether it ends with a correct solution."""
        return solves(self.problem, final_solution(self.trajectory))


def final_solution(trajectory: Trajectory) -> str:
    """The solution that a reply ends with; empty if there is none."""
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
    """Attempt each of the problems once.

    Args:
        engine: Where the model decodes.
        problems: The problems.
        dialect: As for `areason`.
        at_once: Problems under way at the same time.
        width: Branches per fork that the prompts ask for, for a model that was trained with such prompts.
        **options: Options of `areason`.

    Returns:
        The attempts, in the order of the problems.

    Raises:
        AprError: As `areason`.
    """
    gate = asyncio.Semaphore(at_once)

    async def attempt(problem: Problem) -> Attempt:
        async with gate:
            return Attempt(problem, await areason(engine, problem.prompt(width), dialect, **options))

    return await gather(map(attempt, problems))
