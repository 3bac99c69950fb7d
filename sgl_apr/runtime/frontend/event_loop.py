"""An event loop in a thread of its own, for programs that run in other threads and block."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from sgl_apr.errors import AprError, EngineError

T = TypeVar("T")
STOP_TIMEOUT_S = 5.0
DRAIN_TIMEOUT_S = 10.0  # how long cancelled work may take to end
CLOSED = "the apr.Endpoint is closed"
MAX_WAITING_THREADS = 256  # a native fork waits in a thread, and thousands of programs may fork at once


class EventLoopThread:
    """Runs coroutines for other threads until it is closed."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._closing = self._ended = False
        self._tasks = set[asyncio.Task[None]]()  # a loop keeps only weak references
        self._executor = ThreadPoolExecutor(MAX_WAITING_THREADS, thread_name_prefix=f"{name}-fork")
        self._loop.set_default_executor(self._executor)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_forever()
        self._ended = True
        self._loop.run_until_complete(self._drain(None))  # what was submitted in the last moment
        self._executor.shutdown(wait=False)
        self._loop.close()

    @property
    def is_running(self) -> bool:
        """Whether the loop still takes work."""
        return self._loop.is_running()

    def check_may_wait(self) -> None:
        """Check that this is called in another thread than the loop's, which would wait for itself.

        Raises:
            AprError: It is called in the loop.
        """
        if threading.current_thread() is self._thread:
            raise AprError(
                "an event callback or an async tool waits for a program of the same apr.Endpoint, which would never end: "
                "expected another thread, such as a tool that is a blocking function"
            )

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `work` and return its future at once.

        Raises:
            EngineError: The loop is closed.
        """
        if self._closing:
            work.close()
            raise EngineError(CLOSED)
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError as error:  # closed meanwhile
            work.close()
            raise EngineError(CLOSED) from error
        if self._ended:  # the loop may never come to this work, and a reader would wait for it forever
            future.cancel()
            raise EngineError(CLOSED)
        return future

    def call_soon(self, callback: Callable[..., object], *arguments: Any) -> None:
        """Call `callback` in the loop. After `close` it is dropped, because no caller waits for it."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel what runs, wait until it has ended, run `last`, and stop the thread.

        Args:
            last: Makes the last coroutine of the loop, such as closing connections.
        """
        if self._loop.is_running():
            self._closing = True
            wait_for(asyncio.run_coroutine_threadsafe(self._drain(last), self._loop))
        self.call_soon(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)

    def close_soon(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do the same without waiting, in any thread, also in the loop's own."""

        async def drain_and_stop() -> None:
            try:
                await self._drain(last)
            finally:
                self._loop.stop()

        self._closing = True
        self.call_soon(lambda: self._tasks.add(self._loop.create_task(drain_and_stop())))

    async def _drain(self, last: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        # A cancelled task aborts its requests on the server. Wait for that, and do not cancel it. A tool may never end.
        deadline = self._loop.time() + DRAIN_TIMEOUT_S
        while running := asyncio.all_tasks() - {asyncio.current_task()}:
            if (left := deadline - self._loop.time()) <= 0:
                break
            await asyncio.wait(running, timeout=left)
        if last:
            await last()


def wait_for(future: Future[T]) -> T:
    """Block until `future` has a result and return it.

    Raises:
        EngineError: If the future was cancelled, also because the main thread has ended.
    """
    while not wait([future], timeout=0.5).done:
        if not threading.main_thread().is_alive():  # interrupted: do not hold the process up
            future.cancel()
    try:
        return future.result()
    except CancelledError:
        raise EngineError("the program was cancelled, and its requests were aborted") from None
