"""Threads of blocking tools: how many there are, and that nothing waits for one that does not end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from contextvars import ContextVar

import pytest

from sgl_apr.runtime.tools.call_threads import CallThreads

NAME: ContextVar[str] = ContextVar("NAME", default="nobody")


def test_a_function_runs_in_a_thread_with_the_context_of_its_caller():
    async def run() -> tuple[str, bool]:
        NAME.set("caller")
        return await CallThreads().run(lambda: (NAME.get(), threading.current_thread().daemon))

    assert asyncio.run(run()) == ("caller", True)


@pytest.mark.parametrize("error", [ValueError("x"), StopIteration(), SystemExit(2), KeyboardInterrupt()])
def test_what_it_raises_is_raised_and_ends_no_event_loop(error: BaseException):
    def fail() -> None:
        raise error

    async def run() -> str:
        with pytest.raises((ValueError, RuntimeError)):
            await CallThreads().run(fail)
        return await CallThreads().run(lambda: "goes on")

    assert asyncio.run(run()) == "goes on"


def test_calls_above_the_number_wait_for_one_to_end():
    """Also one that was given up, whose thread continues."""
    release, running = threading.Event(), []

    def block() -> int:
        running.append(1)
        release.wait(10)
        return len(running)

    async def run() -> tuple[int, int, int]:
        threads = CallThreads(max_threads=1)
        given_up = asyncio.create_task(threads.run(block))
        await asyncio.sleep(0.05)
        given_up.cancel()
        cancelled = asyncio.create_task(threads.run(block))
        waiting = asyncio.create_task(threads.run(block))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        before = len(running)
        release.set()
        return before, await waiting, await threads.run(block)

    assert asyncio.run(run()) == (1, 2, 3)


def test_a_thread_whose_event_loop_has_ended_frees_its_place():
    release, threads = threading.Event(), CallThreads(max_threads=1)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(threads.run(lambda: release.wait(10)), 0.05)

    asyncio.run(give_up())
    release.set()
    assert asyncio.run(asyncio.wait_for(threads.run(lambda: "free"), 5)) == "free"


def test_the_process_ends_while_a_function_never_returns():
    program = (
        "import asyncio, threading\n"
        "from sgl_apr.runtime.tools.call_threads import CallThreads\n"
        "async def main():\n"
        "    task = asyncio.create_task(CallThreads().run(threading.Event().wait))\n"
        "    await asyncio.sleep(0.05)\n"
        "asyncio.run(main())\n"
        "print('ended')\n"
    )
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == "ended\n"
    assert time.monotonic() - started < 30
