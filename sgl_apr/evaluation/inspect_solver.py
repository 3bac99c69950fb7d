"""A solver for Inspect (the package inspect-ai), which answers any Inspect task by one of our methods.

inspect eval my_task.py --model none --solver sgl_apr/reasoning -S method=threadweaver -S url=http://127.0.0.1:30000
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

from inspect_ai.model import ModelOutput, ModelUsage
from inspect_ai.solver import Generate, Solver, TaskState, solver

from sgl_apr.engine.base import Engine
from sgl_apr.engine.http import HttpEngine
from sgl_apr.errors import AprError
from sgl_apr.evaluation.tasks.mathematics import MathTask
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.registry import method as find_method
from sgl_apr.runtime.budget import Budget

TASKS = {"question": QuestionTask, "mathematics": MathTask}
TIMEOUT_S = 600.0
Connect = Callable[[], Awaitable[AbstractAsyncContextManager[Engine]]]


@solver  # type: ignore[untyped-decorator]  # an optional extra
def reasoning(
    method: str = "apr",
    url: str = "http://127.0.0.1:30000",
    task: str = "question",
    budget: str = "",
    temperature: float | None = None,
) -> Solver:
    """Answer with a method of `sgl_apr.methods` on a running server, in place of Inspect's model.

    The output is the answer, with the tokens that it took. The trajectory is in its metadata.

    Args:
        method: Name of the method.
        url: The server.
        task: How the question is put: "question" or "mathematics".
        budget: Limits, as `Budget.parse` reads them.
        temperature: None leaves it to the method.
    """
    sampling = {} if temperature is None else {"temperature": temperature}
    connect = partial(HttpEngine.connect, url, timeout=TIMEOUT_S)
    return method_solver(connect, method, task, budget=Budget.parse(budget), **sampling)


def method_solver(connect: Connect, method: str, task: str = "question", **options: Any) -> Solver:
    """The same on any engine.

    Args:
        connect: Opens an engine.
        method: Name of the method.
        task: How the question is put: "question" or "mathematics".
        **options: Options of the method.

    Raises:
        AprError: If there is no such method or task.
    """
    if task not in TASKS:
        raise AprError(f"no task {task!r}, expected one of {', '.join(TASKS)}")
    solve = find_method(method)

    async def answer(state: TaskState, generate: Generate) -> TaskState:
        question = "\n\n".join(message.text for message in state.messages if message.role != "assistant")
        async with await connect() as engine:
            result = await solve(engine, question, task=TASKS[task](engine), **options)
        state.output = _output(result)
        state.messages.append(state.output.message)
        return state

    return answer


def _output(result: MethodResult) -> ModelOutput:
    m = result.metrics
    output = ModelOutput.from_content(f"sgl_apr/{result.method}", result.answer)
    output.time = result.trajectory.wall_s
    output.usage = ModelUsage(
        input_tokens=m.prompt_tokens - m.cached_tokens,
        input_tokens_cache_read=m.cached_tokens,
        output_tokens=m.total,
        total_tokens=m.prompt_tokens + m.total,
    )
    output.metadata = {
        "label": result.label,
        "score": result.score,
        "critical_path": m.critical_path,
        "branches": m.branches,
        "trajectory": json.loads(result.trajectory.to_json()),
    }
    return output
