"""Several chains of thought in parallel, and a vote on their answers."""

from __future__ import annotations

from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import SampledTask, Task, require_family
from sgl_apr.methods.voting import vote


async def self_consistency(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    n: int = 40,
    temperature: float = 0.7,
    **options: Any,
) -> MethodResult:
    """Sample `n` chains and return the answer with the most votes (Wang 2022, arXiv 2203.11171, section 2).

    The vote is the paper's unweighted one. On a tie, the answer of the earliest chain wins.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `SampledTask`.
        n: Number of chains (40 in the paper, section 3.1); fewer if the budget cannot pay for them.
        temperature: Sampling temperature (0.7 in the paper, section 3.1).
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `SampledTask`.
    """
    prompt = require_family(task, SampledTask).prompt(problem)
    options = {**options, "temperature": temperature}
    async with method_session(engine, prompt.text, "self_consistency", **options) as session:
        width = session.affordable_width(n, task.max_tokens)
        completions = await session.fork(session.root, [prompt.without_text] * width)
        answer, share = vote(task, [task.answer(completion.text) for completion in completions])
        return MethodResult("self_consistency", answer, session.finish(), share)
