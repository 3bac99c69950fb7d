"""Problems to learn from, drawn for each step, and the replies of a served model to them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.evaluation.benchmarks.base import Benchmark, Case
from sgl_apr.evaluation.benchmarks.registry import benchmark
from sgl_apr.methods.native_formats import run_format
from sgl_apr.methods.task import SampledTask, Task, require_family
from sgl_apr.runtime.branch_group import gather
from sgl_apr.runtime.budget import Budget
from sgl_apr.training.grpo_config import Rollouts
from sgl_apr.trajectory.trajectory import Trajectory

AT_ONCE = 512  # replies that are sampled at the same time


@dataclass(frozen=True, slots=True)
class TrainingProblem:
    """A problem of a task, which says how it is put to the model and what is correct."""

    benchmark: Benchmark
    case: Case

    def judge_branches(self, engine: Engine) -> Callable[[str], bool]:
        """Return what judges whether the text of a branch solves it.

        Raises:
            AprError: If the task cannot tell.
        """
        task = require_family(self.benchmark.task(engine), SampledTask)
        if task.branch_solves(self.case.problem, "") is None:
            raise AprError(
                f"{task.name} cannot tell whether a branch found a solution, expected "
                'updates.branch_credit = "group" or "trunk"'
            )
        return lambda text: bool(task.branch_solves(self.case.problem, text))


@dataclass(frozen=True, slots=True)
class Rollout:
    """One reply to a problem.

    Attributes:
        problem: The problem.
        trajectory: The reply.
        answer: The answer in it; empty if it gives none.
        correct: Whether the answer is correct: for a problem without a solution, that there is none.
    """

    problem: TrainingProblem
    trajectory: Trajectory
    answer: str
    correct: bool

    @property
    def is_false_claim(self) -> bool:
        """Whether it gives an answer that is wrong."""
        return bool(self.answer.strip()) and not self.correct


class ProblemPool:
    """The problems of some tasks: some are held out, and each step draws from the others.

    Args:
        rollouts: The tasks, and how many problems there are and each step draws.
        heldout: How many are held out.

    Attributes:
        heldout: The held-out problems, each task's share of them.

    Raises:
        AprError: If there is no such task, or a task has too few problems.
    """

    def __init__(self, rollouts: Rollouts, heldout: int) -> None:
        self._rollouts, self.heldout = rollouts, list[TrainingProblem]()
        pools = dict[str, list[TrainingProblem]]()
        for name, share in rollouts.shares.items():
            generated = benchmark(name, max(1, round(share * rollouts.pool)), "train", rollouts.seed + 1)
            pools[name] = [TrainingProblem(generated, case) for case in generated.cases]
            held = min(round(share * heldout), len(pools[name]))
            self.heldout += random.Random(f"held out {name}").sample(pools[name], held)
        excluded = {problem.case.problem for problem in self.heldout}  # tasks may have the same problems
        self._pools = [[p for p in pool if p.case.problem not in excluded] for pool in pools.values()]
        for (name, share), pool in zip(rollouts.shares.items(), self._pools, strict=True):
            if len(pool) < (needed := ceil(share * rollouts.problems)):
                raise AprError(
                    f"{name} has {len(pool)} problems to learn from beside the {len(self.heldout)} that are held out, expected at "
                    f"least the {needed} of a step"
                )

    def draw(self, step: int) -> list[TrainingProblem]:
        """The problems of a step, the same for the same step: of each task its share, rounded up or down at random."""
        rng, count = random.Random(f"{self._rollouts.seed} {step}"), self._rollouts.problems
        if len(self._pools) == 1:
            return rng.sample(self._pools[0], count)
        offset, bounds = rng.random(), [0.0, *accumulate(self._rollouts.shares.values())]
        ends = [*(int(bound * count + offset) for bound in bounds[:-1]), count]
        counts = [end - begin for begin, end in pairwise(ends)]
        return [p for pool, number in zip(self._pools, counts, strict=True) for p in rng.sample(pool, number)]


async def sample_rollouts(
    engine: Engine, problems: Sequence[TrainingProblem], dialect: str, rollouts: Rollouts, **options: Any
) -> list[Rollout]:
    """Sample one reply to each problem.

    Args:
        engine: Where the model decodes.
        problems: The problems; a problem may occur several times.
        dialect: The format of the replies.
        rollouts: Budget, mode and join of the replies.
        **options: Further options of `areason`.

    Returns:
        The replies, in the order of the problems.
    """
    budget = Budget(
        tokens=rollouts.tokens,
        branch_tokens=rollouts.branch_tokens,
        width=rollouts.width,
        depth=rollouts.depth,
        blocks=rollouts.blocks,
    )
    options = {
        "budget": budget,
        "mode": rollouts.mode,
        "join": rollouts.join or None,
        "pacing": None,
        **options,
    }
    tasks: dict[int, Task[Any]] = {id(p.benchmark): p.benchmark.task(engine) for p in problems}
    gate = asyncio.Semaphore(AT_ONCE)

    async def sample(problem: TrainingProblem) -> Rollout:
        task = tasks[id(problem.benchmark)]
        async with gate:
            result = await run_format(
                dialect, dialect, engine, problem.case.problem, task=task, options=options
            )
        correct = await asyncio.to_thread(problem.benchmark.is_correct, problem.case, result.answer)
        return Rollout(problem, result.trajectory, result.answer, correct)

    return await gather(map(sample, problems))
