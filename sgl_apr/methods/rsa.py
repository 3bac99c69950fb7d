"""Recursive self-aggregation: a population of replies, each step of which aggregates random subsets of the one before."""

from __future__ import annotations

import random
from math import sqrt
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import MethodSession, method_session
from sgl_apr.methods.task import AggregationTask, Task, require_family
from sgl_apr.methods.voting import vote


async def rsa(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    population: int = 16,
    subset: int = 4,
    steps: int = 10,
    temperature: float = 1.0,
    **options: Any,
) -> MethodResult:
    """Recursive Self-Aggregation (Venkatraman 2025, arXiv 2509.26626, section 3).

    The first step samples a population of replies. Each further step draws a subset of it for each place, and the model
    writes a better reply from the complete replies of the subset. The replies of a step run in parallel. The last population
    votes. Where the budget cannot pay for all replies, population and steps shrink in the same proportion.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: An `AggregationTask`.
        population: Replies of each step (N = 16 in the paper, section 5).
        subset: Replies that each new one reads (K = 4).
        steps: Steps, the first one included (T = 10).
        temperature: Sampling temperature (1.0 in the paper).
        options: Those of `MethodSession`; its seed also draws the subsets.

    Raises:
        Inapplicable: If the task is no `AggregationTask`.
    """
    for name, value in (("population", population), ("subset", subset), ("steps", steps)):
        if value < 1:
            raise AprError(f"{name}={value}, expected at least 1")
    aggregated = require_family(task, AggregationTask)
    first = aggregated.prompt(problem)
    options = {**options, "temperature": temperature}
    async with method_session(engine, first, "rsa", **options) as session:
        draw = random.Random(session.requests.seed)
        population, steps = _affordable(session, population, steps, task.max_tokens)
        replies = await session.fork(session.root, [first.without_text] * population, share=1 / steps)
        for step in range(1, steps):
            pool = [reply for reply in replies if reply.text.strip()]
            if not pool:
                break
            subsets = [draw.sample(pool, min(subset, len(pool))) for _ in range(population)]
            contexts = []
            for chosen in subsets:
                prompt = aggregated.aggregation_prompt(problem, [reply.text.strip() for reply in chosen])
                contexts.append((prompt.text, chosen, prompt.without_text))
            new = await session.sample_with_context(contexts, share=1 / (steps - step))
            replies = [one if one.text.strip() else old for one, old in zip(new, replies, strict=True)]
        answer, score = vote(task, [task.answer(reply.text) for reply in replies])
        return MethodResult("rsa", answer, session.finish(), score)


def _affordable(session: MethodSession, population: int, steps: int, tokens: int) -> tuple[int, int]:
    """A population and a number of steps that the budget pays for, in the proportion of those wanted."""
    affordable = session.affordable_width(population * steps, tokens)
    if affordable == population * steps:
        return population, steps
    smaller = max(1, min(population, int(sqrt(affordable * population / steps))))
    return smaller, max(1, min(steps, affordable // smaller))
