"""Patches SGLang's front end, so that reading a failed program raises its error instead of waiting forever.

It also lets a program that streams be read as soon as it has started.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sgl_apr.engine.sglang_names import SUPPORTED_SGLANG
from sgl_apr.errors import UnsupportedEngine

START_TIMEOUT_S = 5.0  # how long a program may take to start, before reading an unknown variable is an error


def check_sglang() -> None:
    """Check that the supported version of SGLang is installed.

    Raises:
        UnsupportedEngine: It is another version, or SGLang is not installed.
    """
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        installed = "none"
    if installed != SUPPORTED_SGLANG:
        raise UnsupportedEngine(f"sglang {installed} is installed, expected sglang=={SUPPORTED_SGLANG}")


def patch_frontend() -> None:
    """Make reads of a failed program raise its error, for backends with `raises_errors`.

    In SGLang 0.5.23, a worker thread that fails sets the events that it knows and ends. Reading a variable then raises
    KeyError. Reading a variable that is submitted later waits forever, and so may `sync`. The worker sets its last
    event before it is marked as ended, so a reader in between waits forever too.

    Raises:
        UnsupportedEngine: Another version of SGLang is installed.
    """
    from sglang.lang.interpreter import ProgramState, StreamExecutor

    if getattr(StreamExecutor, "_apr_patched", False):
        return
    check_sglang()
    stock_get_var, stock_meta, stock_sync = (
        StreamExecutor.get_var,
        StreamExecutor.get_meta_info,
        StreamExecutor.sync,
    )
    stock_text_iter, stock_async_iter = ProgramState.text_iter, ProgramState.text_async_iter
    stock_worker = StreamExecutor._thread_worker_func

    def get_var(self: Any, name: str) -> Any:
        if _raises_errors(self) and not _wait_for_variable(self, name):
            raise self.error_
        return stock_get_var(self, name)

    def get_meta_info(self: Any, name: str, timeout: float | None = None) -> Any:
        if _raises_errors(self) and timeout is None and not _wait_for_variable(self, name):
            raise self.error_
        return stock_meta(self, name, timeout)

    def sync(self: Any) -> None:
        if not _raises_errors(self):
            stock_sync(self)
            return
        tasks = self.queue
        with tasks.all_tasks_done:
            while tasks.unfinished_tasks and self.worker.is_alive():
                tasks.all_tasks_done.wait(0.1)

    def text_iter(self: Any, var_name: str | None = None) -> Iterator[str]:
        yield from stock_text_iter(self, var_name)
        if _raises_errors(self.stream_executor) and self.stream_executor.error_ is not None:
            raise self.stream_executor.error_

    async def text_async_iter(self: Any, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        async for piece in stock_async_iter(self, *arguments, **options):
            yield piece
        if _raises_errors(self.stream_executor) and self.stream_executor.error_ is not None:
            raise self.stream_executor.error_

    def worker(self: Any) -> None:
        stock_worker(self)
        if _raises_errors(self) and self.stream_text_event:
            self.stream_text_event.set()

    StreamExecutor.get_var, StreamExecutor.get_meta_info = get_var, get_meta_info
    StreamExecutor.sync, StreamExecutor._thread_worker_func = sync, worker
    ProgramState.text_iter, ProgramState.text_async_iter = text_iter, text_async_iter
    StreamExecutor._apr_patched = True


def _raises_errors(executor: Any) -> bool:
    return bool(executor.use_thread and getattr(executor.backend, "raises_errors", False))


def _wait_for_variable(executor: Any, name: str) -> bool:
    """Wait until a variable is there (True) or its worker has failed without it (False)."""
    # A streamed program starts in a thread of its own, so at first its variables are unknown.
    deadline = time.monotonic() + (START_TIMEOUT_S if executor.stream_text_event else 0.0)
    while name not in executor.variable_event and name not in executor.variables:
        if not executor.worker.is_alive() or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    event = executor.variable_event.get(name)
    while event is not None and not event.wait(0.2):
        if not executor.worker.is_alive():
            break
    if name in executor.variables and (event is None or event.is_set()) and executor.error_ is None:
        return True
    if event is not None and (not event.is_set() or name not in executor.variables):
        executor.worker.join(5)  # it sets `error_` as the last thing it does
    return executor.error_ is None or (name in executor.variables and name in executor.meta_info)
