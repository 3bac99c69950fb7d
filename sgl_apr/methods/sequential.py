"""A single chain of thought, the baseline of all other methods."""

from __future__ import annotations

from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import SampledTask, Task, require_family


async def sequential(engine: Engine, problem: Any, *, task: Task[Any], **options: Any) -> MethodResult:
    """Sample one reply and read its answer (chain of thought: Wei 2022, arXiv 2201.11903).

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `SampledTask`.
        options: Those of `MethodSession`: `budget`, `on_event`, and sampling parameters.

    Raises:
        Inapplicable: If the task is no `SampledTask`.
    """
    prompt = require_family(task, SampledTask).prompt(problem)
    async with method_session(engine, prompt, "sequential", **options) as session:
        completion = await session.continue_from(session.root, prompt.without_text)
        return MethodResult("sequential", task.answer(completion.text), session.finish())
