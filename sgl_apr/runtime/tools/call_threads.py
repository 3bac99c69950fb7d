"""Runs blocking functions in threads that neither the event loop nor the end of the process waits for."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

MAX_THREADS = 64  # those of functions that never return included


class CallThreads:
    """Daemon threads, one for each call, up to a number. Further calls wait for one to end.

    Args:
        max_threads: How many run at once.
    """

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._free = max_threads
        self._lock = threading.Lock()
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    async def run(self, function: Callable[[], Any]) -> Any:
        """Return what a function returns. If this is cancelled, its thread continues, and its result is lost."""
        await self._acquire()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def work() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                result = context.run(function)
            except BaseException as raised:  # `sys.exit()` in a tool as well
                error = raised
            finally:
                self._release()
            _call_soon(loop, _resolve, future, result, error)

        try:
            threading.Thread(target=work, name="sgl-apr-tool", daemon=True).start()
        except RuntimeError:  # the system has no more threads
            self._release()
            raise
        return await future

    async def _acquire(self) -> None:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return
            turn: asyncio.Future[None] = loop.create_future()
            self._waiting.append((loop, turn))
        try:
            await turn
        except asyncio.CancelledError:
            with self._lock:
                waits = (loop, turn) in self._waiting
                if waits:
                    self._waiting.remove((loop, turn))
            if not waits:  # it was its turn
                self._release()
            raise

    def _release(self) -> None:
        """Let the next call start. Called in any thread."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._free += 1
                    return
                loop, turn = self._waiting.popleft()
            if _call_soon(loop, _grant, turn):
                return


def _grant(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():  # nobody waits for it any more
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        future.set_exception(error)
    else:  # a future cannot hold these, or they would end the event loop
        future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: Any) -> bool:
    """Call a function in an event loop. False if the loop has ended."""
    try:
        loop.call_soon_threadsafe(callback, *arguments)
    except RuntimeError:
        return False
    return True
