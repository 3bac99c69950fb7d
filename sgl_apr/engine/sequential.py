"""An engine that decodes one request at a time, to measure what parallel decoding gains."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sgl_apr.engine.base import Engine, GroupRequest, Load, Request, Result, TokenSink, WorkerSink
from sgl_apr.engine.chat_template import encode_messages
from sgl_apr.errors import EngineError, UnsupportedEngine
from sgl_apr.formats.masks.writer import GrammarBackend
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.worker_groups import GroupKind


class SequentialEngine:
    """Wraps an engine so that it decodes one request at a time. Its forks share the same queue.

    Args:
        engine: The engine that does the work.
        lock: Held while a request decodes. Forks pass on the lock of the engine that they come from.
    """

    def __init__(self, engine: Engine, lock: asyncio.Lock | None = None) -> None:
        self._engine, self._lock = engine, lock or asyncio.Lock()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def grammar_backend(self) -> GrammarBackend:
        return self._engine.grammar_backend

    @property
    def supports_seeds(self) -> bool:
        return self._engine.supports_seeds

    @property
    def context(self) -> int | None:
        return self._engine.context

    @property
    def joins_kv(self) -> bool:
        return self._engine.joins_kv

    @property
    def caches_output(self) -> bool:
        return self._engine.caches_output

    @property
    def resumes_grammar(self) -> bool:
        return self._engine.resumes_grammar

    @property
    def groups(self) -> Collection[GroupKind]:
        return ()  # workers of a group decode together

    async def group(
        self,
        group: GroupRequest,
        on_tokens: Sequence[TokenSink | None] | None = None,
        on_end: WorkerSink | None = None,
    ) -> Sequence[Result | EngineError]:
        """Refuse: one request decodes at a time."""
        raise UnsupportedEngine(
            "this engine decodes one request at a time, and the workers of a group decode together"
        )

    async def decode(self, request: Request, on_tokens: TokenSink | None = None) -> Result:
        """Decode once all earlier requests have ended."""
        async with self._lock:
            return await self._engine.decode(request, on_tokens)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Sequence[int]:
        return await encode_messages(self._engine, messages, tools)

    async def commit(self, request: Request) -> Result:
        return await self._engine.commit(request)

    async def fork(self, request: Request, size: int) -> tuple[Result, Sequence[SequentialEngine]]:
        result, engines = await self._engine.fork(request, size)
        return result, [SequentialEngine(engine, self._lock) for engine in engines]

    async def release(self) -> None:
        await self._engine.release()

    async def abort(self, rid: str) -> None:
        await self._engine.abort(rid)

    async def load(self) -> Load:
        return await self._engine.load()
