"""A stream of events from a trajectory that reports them to a callback."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

import sgl_apr as apr
from sgl_apr.runtime.event_queue import stream_events
from sgl_apr.runtime.events import OnEvent
from tests.runtime.test_loop import scripted


def test_the_trajectory_comes_after_its_events():
    async def collect() -> list:
        engine = scripted()
        return [item async for item in stream_events(lambda f: apr.areason(engine, "Q: ", on_event=f))]

    *events, trajectory = asyncio.run(collect())
    assert isinstance(trajectory, apr.Trajectory)
    assert apr.rebuild(events) == trajectory


def test_an_error_comes_after_the_events_before_it():
    async def run(on_event: OnEvent) -> apr.Trajectory:
        on_event(apr.Delta((), "a"))
        raise apr.EngineError("gone")

    async def collect() -> None:
        events = stream_events(run)
        assert await anext(events) == apr.Delta((), "a")
        with pytest.raises(apr.EngineError, match="gone"):
            await anext(events)

    asyncio.run(collect())


def test_closing_cancels_and_waits_for_the_end():
    ended = []

    async def run(on_event: OnEvent) -> apr.Trajectory:
        try:
            on_event(apr.Delta((), "a"))
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append(True)
        raise AssertionError

    async def take_one() -> None:
        async with aclosing(stream_events(run)) as events:
            assert await anext(events) == apr.Delta((), "a")
        assert ended

    asyncio.run(take_one())
