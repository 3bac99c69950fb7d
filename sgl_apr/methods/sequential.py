"""One chain of thought from beginning to end: what every other method is measured against."""

from __future__ import annotations

from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import Task


async def sequential(engine: Engine, problem: Any, *, task: Task[Any, Any], **options: Any) -> MethodResult:
    """Ask once, and read the answer (chain of thought: Wei 2022, arXiv 2201.11903).

    Options are those of `Thoughts`: budget, on_event, and sampling parameters.
    """
    ask = task.ask(problem)
    async with method_session(engine, ask.text, "sequential", **options) as thoughts:
        thought = await thoughts.continue_from(thoughts.root, ask.without_text)
        return MethodResult("sequential", task.answer(thought.text), thoughts.finish())
