"""Patches SGLang's front end, so that reading a failed program raises its error instead of waiting forever.

It also lets a program that streams be read at any time, and raises there what its function has raised.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sgl_apr.engine.sglang_names import SUPPORTED_SGLANG
from sgl_apr.errors import AprError, UnsupportedEngine
from sgl_apr.runtime.frontend.engine_call import EngineCall, Reason
from sgl_apr.runtime.frontend.program_queue import QueueModule, drop_tasks, end_program

log = logging.getLogger(__name__)


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
    """Make reads of a failed program raise its error, for backends with `raises_errors` and for errors of this package.

    In SGLang 0.5.23, a worker thread that fails sets the events that it knows and ends. Reading a variable then raises
    KeyError. Reading a variable that is submitted later waits forever, and so may `sync`. The worker sets its last
    event before it is marked as ended, so a reader in between waits forever too.

    The worker also prints a warning with a traceback. Where reading raises the error, it is not printed twice.

    Raises:
        UnsupportedEngine: Another version of SGLang is installed.
    """
    from sglang.lang import interpreter
    from sglang.lang.interpreter import ProgramState, StreamExecutor

    from sgl_apr.runtime.frontend.program_forks import ProgramFailure, fail, patch_forks

    if getattr(StreamExecutor, "_apr_patched", False):
        return
    check_sglang()
    stock_get_var, stock_meta, stock_sync = (
        StreamExecutor.get_var,
        StreamExecutor.get_meta_info,
        StreamExecutor.sync,
    )
    stock_text_iter, stock_async_iter = ProgramState.text_iter, ProgramState.text_async_iter
    stock_execute_gen, stock_run_internal = StreamExecutor._execute_gen, interpreter.run_internal

    def get_var(self: Any, name: str) -> Any:
        _check_may_wait(self)
        if _raises_errors(self) and not _wait_for_variable(self, name):
            raise self.error_
        try:
            return stock_get_var(self, name)
        except KeyError:
            _raise_own_error(self)
            raise

    def get_meta_info(self: Any, name: str, timeout: float | None = None) -> Any:
        _check_may_wait(self)
        if _raises_errors(self) and timeout is None and not _wait_for_variable(self, name):
            raise self.error_
        meta = stock_meta(self, name, timeout)
        if meta is None:
            _raise_own_error(self)
        return meta

    def sync(self: Any) -> None:
        _check_may_wait(self)
        if not self.use_thread:
            stock_sync(self)
            return
        tasks = self.queue
        with tasks.all_tasks_done:
            while tasks.unfinished_tasks and self.worker.is_alive():
                tasks.all_tasks_done.wait(0.1)

    def text_iter(self: Any, var_name: str | None = None) -> Iterator[str]:
        _check_will_run(self.stream_executor, var_name)
        yield from stock_text_iter(self, var_name)
        _raise_if_failed(self.stream_executor)

    async def text_async_iter(
        self: Any, var_name: str | None = None, *arguments: Any, **options: Any
    ) -> AsyncIterator[Any]:
        _check_will_run(self.stream_executor, var_name)
        async for piece in stock_async_iter(self, var_name, *arguments, **options):
            yield piece
        _raise_if_failed(self.stream_executor)

    def run_internal(state: Any, program: Any, arguments: Any, options: Any, sync: bool) -> None:
        executor = state.stream_executor
        executor.apr_program_thread = threading.current_thread()
        if not (executor.stream and _raises_errors(executor)):
            stock_run_internal(state, program, arguments, options, sync)
            return
        try:
            state.ret_value = program.func(state, *arguments, **options)
        except Exception as error:  # nobody waits for the thread that it is raised in
            log.debug("a program failed", exc_info=error)
            fail(executor, error)
        finally:
            executor.end()
        if sync:
            executor.sync()

    def execute_gen(self: Any, expression: Any) -> None:
        check_backend(self.backend, expression)
        if isinstance(failure := expression.sampling_params.dtype, ProgramFailure):
            raise failure.error
        stock_execute_gen(self, expression)

    StreamExecutor.get_var, StreamExecutor.get_meta_info = get_var, get_meta_info
    StreamExecutor.sync, StreamExecutor._thread_worker_func = sync, _run_worker
    StreamExecutor._execute_gen, StreamExecutor.end = execute_gen, end_program
    ProgramState.text_iter, ProgramState.text_async_iter = text_iter, text_async_iter
    # A program that calls `apr.reason` first has a worker that runs already, as SGLang made it.
    interpreter.warnings, interpreter.run_internal = _WorkerWarnings, run_internal
    interpreter.queue = QueueModule
    patch_forks()
    StreamExecutor._apr_patched = True


class _WorkerWarnings:
    """Stands for the module `warnings` in SGLang's interpreter, which uses it only where a worker has failed."""

    @staticmethod
    def warn(message: str) -> None:
        """Warn, unless the error is one of this package, which reading the program raises."""
        if not isinstance(sys.exc_info()[1], AprError):
            warnings.warn(message, stacklevel=2)


def check_backend(backend: Any, expression: Any) -> None:
    """Check that a backend can run an expression.

    Raises:
        UnsupportedEngine: The expression is `apr.reason` or `apr.solve`, and the backend is another than `apr.Endpoint`.
    """
    kind = expression.sampling_params.dtype
    if isinstance(kind, Reason | EngineCall) and not getattr(backend, "raises_errors", False):
        raise UnsupportedEngine(
            f"{kind}: found {type(backend).__name__}, expected backend=apr.Endpoint(url) "
            "with the URL of the same server"
        )


def _run_worker(self: Any) -> None:
    """Execute what is submitted, as `StreamExecutor._thread_worker_func` does."""
    error = None
    while (expression := self.queue.get()) is not None:
        try:
            self._execute(expression)
        except Exception as failed:
            error = failed
            break
        self.queue.task_done()
        if self.stream_text_event:
            self.stream_text_event.set()
    if error is not None:
        self.error_ = error  # before the events, so that who waits for them finds it
        drop_tasks(self.queue)
        for events in (self.variable_event, self.stream_var_event or {}):
            for name in list(events):
                events[name].set()
    self.is_finished = True
    if self.stream_text_event:
        self.stream_text_event.set()
    if error is None:
        return
    if _raises_errors(self) or isinstance(error, AprError):
        log.debug("a program failed", exc_info=error)
    else:  # last, because warnings can be errors
        import traceback

        warnings.warn(f"Error in stream_executor: {''.join(traceback.format_exception(error))}", stacklevel=1)


def _raise_if_failed(executor: Any) -> None:
    """Raise the error of a program that has ended."""
    if _raises_errors(executor) and executor.error_ is not None:
        raise executor.error_
    _raise_own_error(executor)


def _raise_own_error(executor: Any) -> None:
    """Raise the error of a failed program if it is one of this package, whatever its backend."""
    if isinstance(executor.error_, AprError):
        raise executor.error_


def _raises_errors(executor: Any) -> bool:
    return bool(executor.use_thread and getattr(executor.backend, "raises_errors", False))


def program_thread(executor: Any) -> threading.Thread | None:
    """Return the thread that runs the function of a program, None before it has started."""
    return getattr(executor, "apr_program_thread", None)


def _check_may_wait(executor: Any) -> None:
    """Raise an error where waiting for a program would stop the event loop that runs it."""
    if check := getattr(executor.backend, "check_may_wait", None):
        check()


def _check_will_run(executor: Any, name: str | None) -> None:
    """Raise an error where a variable was added to a program that has ended, for which a reader would wait forever."""
    event = executor.variable_event.get(name)
    if not _raises_errors(executor) or event is None or event.is_set() or executor.error_ is not None:
        return
    if executor.is_finished and not event.is_set():
        raise AprError(
            f"{name!r} was added to a program that has ended, so that nothing runs it: "
            "expected it in the program's function, or before `join` in a fork"
        )


def _wait_for_variable(executor: Any, name: str) -> bool:
    """Wait until a variable is there (True) or its worker has failed without it (False).

    Raises:
        AprError: The program ended before the variable was added.
    """
    # A streamed program runs in a thread of its own, so a variable that is not known yet may still come.
    may_come = executor.stream_text_event and threading.current_thread() is not program_thread(executor)
    while name not in executor.variable_event and name not in executor.variables:
        if not may_come or not executor.worker.is_alive():
            break
        time.sleep(0.01)
    event = executor.variable_event.get(name)
    while event is not None and not event.wait(0.2):
        if not executor.worker.is_alive():
            break
    if name in executor.variables and (event is None or event.is_set()) and executor.error_ is None:
        return True
    if event is not None and (not event.is_set() or name not in executor.variables):
        executor.worker.join(5)  # it may be about to set the event or `error_`
        _check_will_run(executor, name)
    return executor.error_ is None or (name in executor.variables and name in executor.meta_info)
