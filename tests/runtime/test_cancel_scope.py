"""Scopes end with what is inside them, whatever the clock shows when their timer fires."""

from __future__ import annotations

import asyncio

import pytest

from sgl_apr.runtime.cancel_scope import CancelScope, ScopeCancelled


def test_a_timer_that_fires_early_ends_the_scopes_inside():
    async def run() -> tuple[str | None, ...]:
        loop = asyncio.get_running_loop()
        start = loop.time()
        outer = CancelScope(deadline=start + 0.01, limit="seconds")
        inner = CancelScope(outer, start + 60, "branch_seconds")
        with pytest.raises(ScopeCancelled):
            await outer.run(asyncio.sleep(5))
        loop.time = lambda: start + 0.0095  # type: ignore[method-assign]
        return outer.cancel_reason, inner.cancel_reason, inner.limit, CancelScope(inner).cancel_reason

    assert asyncio.run(run()) == ("timeout", "timeout", "seconds", "timeout")


def test_a_deadline_inside_ends_nothing_outside():
    async def run() -> tuple[str | None, str | None]:
        outer = CancelScope(deadline=asyncio.get_running_loop().time() + 60, limit="seconds")
        inner = CancelScope(outer, asyncio.get_running_loop().time() + 0.01, "branch_seconds")
        with pytest.raises(ScopeCancelled):
            await inner.run(asyncio.sleep(5))
        return outer.cancel_reason, inner.cancel_reason

    assert asyncio.run(run()) == (None, "timeout")
