"""Calls the function of a tool, for a limited time. What does not end in time is left to itself."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, TypeVar

from sgl_apr.runtime.tools.call_threads import CallThreads
from sgl_apr.runtime.tools.request import RunTool, ToolRequest
from sgl_apr.runtime.tools.results import result_text

T = TypeVar("T")

_threads = CallThreads()
_abandoned = set[asyncio.Task[Any]]()  # an event loop keeps no reference to its tasks


async def call_function(
    function: Callable[..., Any], arguments: Mapping[str, Any], seconds: float
) -> str | None:
    """Return the text of what a function returns, None if it takes longer than some seconds.

    An async function runs in this event loop, and is cancelled when time is up. Any other function runs in a thread of its
    own, which then continues. Neither is awaited.

    Args:
        function: The function of a tool.
        arguments: Its keyword arguments.
        seconds: How long it may take.

    Raises:
        Exception: What the function raised.
    """
    return await _run_limited(_call(partial(function, **arguments)), seconds)


async def call_client(run_tool: RunTool, request: ToolRequest) -> str:
    """Return the text that `ReasonOptions.run_tool` returns. It limits its own time."""
    return result_text(await _run_limited(_guarded(run_tool(request)), None))


async def _call(function: Callable[[], Any]) -> str:
    if _is_async(function):
        return result_text(await _guarded(function()))

    def in_thread() -> Any:
        value = function()
        return value if inspect.isawaitable(value) else result_text(value)

    value = await _threads.run(in_thread)
    return result_text(await _guarded(value)) if inspect.isawaitable(value) else value


async def _guarded(awaitable: Awaitable[T]) -> T:
    """What an awaitable returns. `sys.exit()` in it does not end the event loop."""
    try:
        return await awaitable
    except SystemExit as error:
        raise RuntimeError(f"SystemExit: {error}") from error


async def _run_limited(work: Coroutine[Any, Any, T], seconds: float | None) -> T | None:
    """The result of work in a task of its own, None if time is up. Then, or if this is cancelled, the task is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        _abandon(task)
        raise
    if not done:
        _abandon(task)
        return None
    if task.cancelled():
        raise RuntimeError("the tool cancelled itself")
    return task.result()


def _abandon(task: asyncio.Task[Any]) -> None:
    """Cancel a task without waiting for it: it may not end."""
    _abandoned.add(task)

    def forget(ended: asyncio.Task[Any]) -> None:
        _abandoned.discard(ended)
        if not ended.cancelled():
            ended.exception()  # it is nobody's any more, and not to be logged

    task.add_done_callback(forget)
    task.cancel()


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # of an object
    )
