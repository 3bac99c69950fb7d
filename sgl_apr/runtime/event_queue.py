"""Turns a trajectory that reports its events to a callback into a stream of these events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from sgl_apr.runtime.events import Event, OnEvent

T = TypeVar("T")


async def stream_events(
    run: Callable[[OnEvent], Coroutine[Any, Any, T]],
) -> AsyncGenerator[Event | T, None]:
    """Run a trajectory in a task of its own and yield its events as they happen.

    Closing the generator cancels the task and waits until it has ended.

    Args:
        run: Starts the trajectory. Its argument is the callback for the events.

    Yields:
        Every event, then what `run` returns: the finished trajectory.

    Raises:
        Exception: What `run` raises, after the events before it.
    """
    events = asyncio.Queue[Event | None]()
    task = asyncio.create_task(run(events.put_nowait))
    task.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (event := await events.get()) is not None:
            yield event
        yield await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
