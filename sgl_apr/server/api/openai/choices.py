"""Runs the choices of one request: trajectories that run at once, as one stream or as one result."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from sgl_apr.runtime.branch_group import gather
from sgl_apr.runtime.events import Delta, Event
from sgl_apr.server.api.options import CheckedRequest
from sgl_apr.trajectory.trajectory import Trajectory

if TYPE_CHECKING:
    from sgl_apr.server.api.service import TrajectoryService

SEED_RANGE = 2**63


def make_choices(request: CheckedRequest, choices: int) -> list[CheckedRequest]:
    """Return the requests of so many choices. They differ by their seeds: the seed of the request, and those after it."""
    seed = request.options.seed
    if seed is None:
        return [request] * choices
    return [
        replace(request, options=replace(request.options, seed=(seed + k) % SEED_RANGE if k else seed))
        for k in range(choices)
    ]


async def run_choices(service: TrajectoryService, requests: Sequence[CheckedRequest]) -> list[Trajectory]:
    """Run trajectories with one prompt at once. If one of them fails, the others are cancelled.

    The first one starts alone, so that the others find the prompt in the cache.
    """
    if len(requests) == 1:
        return [await service.run(requests[0])]
    prompt_is_cached = asyncio.Event()

    async def run(index: int, request: CheckedRequest) -> Trajectory:
        if index:
            await prompt_is_cached.wait()
            return await service.run(request)
        try:
            return await service.run(request, lambda event: _note_text(event, prompt_is_cached))
        finally:
            prompt_is_cached.set()

    return await gather(run(index, request) for index, request in enumerate(requests))


async def stream_choices(
    service: TrajectoryService, requests: Sequence[CheckedRequest]
) -> AsyncGenerator[tuple[int, Event | Trajectory], None]:
    """Yield the events of trajectories with one prompt that run at once, each with the index of its trajectory.

    The last event of each is the trajectory itself. If one of them fails, the others are cancelled.
    """
    events = asyncio.Queue[tuple[int, Event | Trajectory] | None]()
    prompt_is_cached = asyncio.Event()

    async def run(index: int, request: CheckedRequest) -> None:
        if index:
            await prompt_is_cached.wait()
        try:
            async with aclosing(service.stream(request)) as stream:
                async for event in stream:
                    _note_text(event, prompt_is_cached)
                    events.put_nowait((index, event))
        finally:
            prompt_is_cached.set()

    task = asyncio.ensure_future(gather(run(index, request) for index, request in enumerate(requests)))
    task.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (item := await events.get()) is not None:
            yield item
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _note_text(event: Event | Trajectory, is_written: asyncio.Event) -> None:
    if isinstance(event, Delta):
        is_written.set()
