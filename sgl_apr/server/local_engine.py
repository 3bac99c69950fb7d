"""An sgl.Engine of this process, with the loop on top."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sgl_apr.engine.in_process import InProcessEngine, T
from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.events import OnEvent
from sgl_apr.runtime.loop import areason
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory


class LocalEngine(InProcessEngine):
    """An `sgl.Engine` of this process, for offline batches and training: no HTTP in between.

    The engine belongs to one event loop. Without one of your own, block on the engine's:

    >>> with apr.LocalEngine.launch("./my-model") as engine:  # doctest: +SKIP
    ...     trajectory = engine.run("Question: ...", mode="parallel")
    ...     outcomes = engine.wait(apr.arun_many(engine, problems, "out.jsonl"))

    In a coroutine `await apr.areason(engine, ...)` as with any engine, and in the same loop from then on.
    As `sgl.Engine` spawns processes, a script that makes one has to guard its main part by `__name__`.
    """

    def __init__(self, engine: Any, *, tokenizer: Tokenizer | None = None, timeout: float = 120.0) -> None:
        super().__init__(engine.tokenizer_manager, tokenizer=tokenizer, timeout=timeout)
        self.engine = engine

    @classmethod
    def launch(cls, model: str | Path, **sglang_flags: object) -> LocalEngine:
        """Start an `sgl.Engine` with the flags that `sgl-apr serve` adds on this hardware; yours win.

        Flags as for `apr.Server`: `context_length=4096`, `radix_cache_backend="apr"`. Raises `LaunchError`
        for flags that cannot work; an engine that dies while it starts takes this process with it, as SGLang
        has it.
        """
        import sglang as sgl

        from sgl_apr.server.constants import LAUNCHED_ENV
        from sgl_apr.server.launch.arguments import server_args
        from sgl_apr.server.launch.defaults import as_flags

        args = server_args(as_flags({"model": model, "log_level": "error"} | sglang_flags))
        before = os.environ.get(LAUNCHED_ENV)
        os.environ[LAUNCHED_ENV] = "1"  # its processes end at once, rather than run without the plugin
        try:
            return cls(sgl.Engine(server_args=args))
        finally:
            os.environ.pop(LAUNCHED_ENV) if before is None else os.environ.update({LAUNCHED_ENV: before})

    def run(
        self,
        prompt: str | Sequence[int],
        dialect: Dialect | str | None = None,
        *,
        on_event: OnEvent | None = None,
        **options: Any,
    ) -> Trajectory:
        """`apr.areason`, blocking."""
        return self.wait(areason(self, prompt, dialect, on_event=on_event, **options))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine over this engine returns, run in the engine's event loop; blocking.

        Raises `AprError` where that loop runs already: await there instead.
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
        """End the engine's processes (and, as SGLang has it, every other child of this process)."""
        self.engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
