"""Trajectories inside the server process: admitted, run, counted, cancelled; requests and answers are made elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from sgl_apr.engine.in_process import InProcessEngine
from sgl_apr.errors import AprError, EngineError
from sgl_apr.runtime.events import Event, OnEvent
from sgl_apr.runtime.loop import run_with_options
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.server.api.counters import ServerCounters
from sgl_apr.server.api.limits import RequestLimits, ServerBusy
from sgl_apr.server.api.options import RequestParser
from sgl_apr.tokenizer import load_tokenizer
from sgl_apr.trajectory.trajectory import Trajectory


class TrajectoryService:
    """Runs trajectories on the engine of a TokenizerManager, within the operator's caps."""

    def __init__(self, manager: Any, caps: RequestLimits) -> None:
        self.manager, self.caps = manager, caps
        self.counters = ServerCounters(
            str(manager.served_model_name), bool(manager.config_value("enable_metrics"))
        )
        self._engine: InProcessEngine | None = None

    async def engine(self) -> InProcessEngine:
        """The engine, made when it is first needed; raises `UnsupportedEngine` where there can be none."""
        if self._engine is None:
            path = str(self.manager.config_value("tokenizer_path"))
            tokenizer = await asyncio.to_thread(load_tokenizer, path)
            self._engine = self._engine or InProcessEngine(self.manager, tokenizer=tokenizer)
        return self._engine

    async def parser(self) -> RequestParser:
        """What makes plans for this server."""
        engine = await self.engine()
        config = self.manager.model_config
        return RequestParser(self.caps, engine.tokenizer, int(config.context_len), int(config.vocab_size))

    async def run(
        self, prompt: tuple[int, ...], plan: ReasonOptions, on_event: OnEvent | None = None
    ) -> Trajectory:
        """`run_plan`, counted; raises `Busy` at once where too many run."""
        if self.counters.running >= self.caps.concurrent:
            self.counters.ended("refused")
            raise ServerBusy(
                f"{self.counters.running} trajectories run, as many as this server allows at once: "
                f"--apr-max-concurrent {self.caps.concurrent}"
            )
        self.counters.running += 1
        try:
            trajectory = await run_with_options(await self.engine(), prompt, plan, on_event)
        except asyncio.CancelledError:
            self.counters.ended("cancelled")
            raise
        except Exception as error:
            asked_too_much = isinstance(error, AprError) and not isinstance(error, EngineError)
            self.counters.ended("refused" if asked_too_much else "failed")
            raise
        finally:
            self.counters.running -= 1
        self.counters.finished(plan, trajectory)
        return trajectory

    async def stream(
        self, prompt: tuple[int, ...], plan: ReasonOptions
    ) -> AsyncGenerator[Event | Trajectory, None]:
        """The events as they happen, and the trajectory behind them; closing it cancels the trajectory.

        The first event, that of the prompt, is held back until there is a second: a request that the engine
        refuses fails before anything is heard.
        """
        heard = asyncio.Queue[Event | None]()
        task = asyncio.create_task(self.run(prompt, plan, heard.put_nowait))
        task.add_done_callback(lambda _: heard.put_nowait(None))
        try:
            held = await heard.get()
            second = await heard.get() if held else None
            if second is None:
                await task
            for event in (held, second):
                if event:
                    yield event
            while second and (event := await heard.get()) is not None:
                yield event
            yield await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
