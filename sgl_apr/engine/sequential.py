"""An engine that decodes one request at a time, to measure what running them at once is worth; it changes nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sgl_apr.engine.base import Engine, Request, Result, TokenSink


class SequentialEngine:
    """All that an engine is, but for its concurrency; forks of it wait for one another too."""

    def __init__(self, engine: Engine, gate: asyncio.Lock | None = None) -> None:
        self._engine, self._gate = engine, gate or asyncio.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def decode(self, request: Request, on_tokens: TokenSink | None = None) -> Result:
        """Decode when all that were asked before have ended."""
        async with self._gate:
            return await self._engine.decode(request, on_tokens)

    async def fork(self, request: Request, size: int) -> tuple[Result, Sequence[Any]]:
        """As the engine does."""
        result, engines = await self._engine.fork(request, size)
        return result, [SequentialEngine(engine, self._gate) for engine in engines]
