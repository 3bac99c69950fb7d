"""Runs the loop on an `sgl.Engine` of this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from sgl_apr.engine.in_process import InProcessEngine, T
from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.arguments import ReasonArguments
from sgl_apr.runtime.events import OnEvent
from sgl_apr.runtime.loop import areason
from sgl_apr.runtime.prompts import Prompt
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory


class LocalEngine(InProcessEngine):
    """An `sgl.Engine` of this process, for offline batches and training, without HTTP.

    The engine belongs to one event loop. If you have no loop of your own, block on the engine's:

    Examples:
        >>> with apr.LocalEngine.launch("./my-model") as engine:  # doctest: +SKIP
        ...     trajectory = engine.run("Question: ...", mode="parallel")
        ...     outcomes = engine.wait(apr.arun_many(engine, problems, "out.jsonl"))

    In a coroutine, `await apr.areason(engine, ...)` as with any engine, and always in the same loop.
    `sgl.Engine` spawns processes, so a script that makes one has to guard its main part by `__name__`.

    Args:
        engine: The `sgl.Engine`.
        tokenizer: The model's tokenizer. None loads it from the path that the engine names.
        timeout: The longest time, in seconds, between two chunks of a response.
    """

    def __init__(self, engine: Any, *, tokenizer: Tokenizer | None = None, timeout: float = 120.0) -> None:
        super().__init__(engine.tokenizer_manager, tokenizer=tokenizer, timeout=timeout)
        self.engine = engine
        self._remove_files: Callable[[], object] = lambda: None

    @classmethod
    def launch(cls, model: str | Path, **sglang_flags: object) -> LocalEngine:
        """Start an `sgl.Engine` with the flags that `sgl-apr serve` adds on this hardware.

        SGLang ends this process if the engine fails while it starts.

        Args:
            model: A directory or a Hugging Face id.
            **sglang_flags: Flags as for `apr.Server`, such as `context_length=4096`. They override the defaults.

        Raises:
            LaunchError: The flags cannot work.
        """
        import sglang as sgl

        from sgl_apr.server.constants import LAUNCHED_ENV
        from sgl_apr.server.launch.arguments import server_args
        from sgl_apr.server.launch.defaults import as_flags
        from sgl_apr.server.launch.server_folder import ServerFolder

        args = server_args(as_flags({"model": model, "log_level": "error"} | sglang_flags))
        before = os.environ.get(LAUNCHED_ENV)
        os.environ[LAUNCHED_ENV] = "1"  # its processes exit at once, rather than run without the plugin
        folder = ServerFolder()
        try:
            with folder.used_by_this_process(metrics=args.enable_metrics):
                local = cls(sgl.Engine(server_args=args))
        except BaseException:
            folder.remove()
            raise
        finally:
            os.environ.pop(LAUNCHED_ENV) if before is None else os.environ.update({LAUNCHED_ENV: before})
        local._remove_files = weakref.finalize(local, folder.remove)
        return local

    def run(
        self,
        prompt: Prompt,
        dialect: Dialect | str | None = None,
        *,
        on_event: OnEvent | None = None,
        **options: Unpack[ReasonArguments],
    ) -> Trajectory:
        """Run `apr.areason` and block until it has the trajectory."""
        return self.wait(areason(self, prompt, dialect, on_event=on_event, **options))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine over this engine in the engine's event loop, and block until it returns.

        Args:
            work: The coroutine.

        Returns:
            What the coroutine returns.

        Raises:
            AprError: The loop is already running. Await the coroutine there instead.
        """
        loop: asyncio.AbstractEventLoop = self.engine.loop
        if loop.is_running():
            work.close()
            raise AprError("the engine's event loop is running: await the coroutine instead")
        task = loop.create_task(work)
        try:
            return loop.run_until_complete(task)
        except BaseException:  # Ctrl-C stops the loop, not the task
            task.cancel()
            with contextlib.suppress(BaseException):
                loop.run_until_complete(task)
            raise

    def shutdown(self) -> None:
        """End the engine's processes and remove its files. SGLang also ends every other child of this process."""
        self.engine.shutdown()
        self._remove_files()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
