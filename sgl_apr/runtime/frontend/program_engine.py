"""The engine inside a running `@sgl.function` program. Its forks are SGLang's native forks of that program."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglGen

from sgl_apr.engine.base import GroupRequest, Load, Request, Result, TokenSink, WorkerSink
from sgl_apr.engine.http import HttpEngine
from sgl_apr.engine.routing import ROUTING_KEY_FIELD
from sgl_apr.errors import EngineError
from sgl_apr.formats.masks.writer import GrammarBackend
from sgl_apr.runtime.frontend.token_ledger import TOKENS_VARIABLE, ProgramTokens
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.worker_groups import GroupKind


class ProgramServer(Protocol):
    """What an engine needs from the backend that its program runs on.

    Attributes:
        http: The connection to the server.
        pending_commits: What a native fork has to commit, by program.
        commit_results: The results of these commits, by program.
    """

    http: HttpEngine
    pending_commits: dict[str, Request]
    commit_results: dict[str, Result]

    def route(self, s: StreamExecutor) -> str:
        """Return the routing key that keeps a program and its forks on one replica."""
        ...


@dataclass
class DecodeCall:
    """A decode call for a forked program, passed in the `dtype` of a native gen.

    Attributes:
        request: The request.
        on_tokens: Receives the ids of each chunk.
        done: Gets the result. Cancelling it aborts the request.
    """

    request: Request
    on_tokens: TokenSink | None
    done: asyncio.Future[Result] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class ProgramEngine:
    """Decodes for one executor: the program's own, or a native fork of it.

    The program's own worker thread is busy running `apr.reason`. So the trunk sends its requests directly to the
    server, and a fork is made from a copy of the program. A forked branch decodes through its own executor.

    Args:
        server: The backend of the program.
        executor: The executor.
        state: The program state of a native fork, None for the program itself.
    """

    def __init__(
        self, server: ProgramServer, executor: StreamExecutor, state: ProgramState | None = None
    ) -> None:
        # A native fork ends when its `ProgramState` is deleted, so a forked engine keeps a reference.
        self.server, self.executor, self.state = server, executor, state

    @property
    def tokenizer(self) -> Tokenizer:
        return self.server.http.tokenizer

    @property
    def grammar_backend(self) -> GrammarBackend:
        return self.server.http.grammar_backend

    @property
    def supports_seeds(self) -> bool:
        return self.server.http.supports_seeds

    async def decode(self, request: Request, on_tokens: TokenSink | None = None) -> Result:
        request = self._routed(request)
        if self.state is None:
            return await self.server.http.decode(request, on_tokens)
        call = DecodeCall(request, on_tokens)
        self.state += SglGen("branch", dtype=call)
        return await call.done  # cancelling this cancels the future, and with it the request

    @property
    def context(self) -> int | None:
        return self.server.http.context

    @property
    def joins_kv(self) -> bool:
        return self.server.http.joins_kv

    @property
    def caches_output(self) -> bool:
        return False  # each branch is a native fork, and SGLang commits before it forks

    @property
    def resumes_grammar(self) -> bool:
        return self.server.http.resumes_grammar

    @property
    def groups(self) -> Collection[GroupKind]:
        return self.server.http.groups

    async def group(
        self,
        group: GroupRequest,
        on_tokens: Sequence[TokenSink | None] | None = None,
        on_end: WorkerSink | None = None,
    ) -> Sequence[Result | EngineError]:
        """Decode a group through the engine that all programs share: its workers are no native forks."""
        routed = replace(group, requests=tuple(map(self._routed, group.requests)))
        return await self.server.http.group(routed, on_tokens, on_end)

    @property
    def tool_call_parser(self) -> str | None:
        """The form of calls of tools that the server names, if it names one."""
        return getattr(self.server.http, "tool_call_parser", None)

    @property
    def chat_engine(self) -> HttpEngine:
        """The engine that renders chat messages, which all programs share."""
        return self.server.http

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Sequence[int]:
        return await self.server.http.encode_chat(messages, tools)

    async def commit(self, request: Request) -> Result:
        return await self.server.http.commit(self._routed(request))

    async def fork(self, request: Request, size: int) -> tuple[Result, Sequence[ProgramEngine]]:
        return await asyncio.to_thread(self._fork, self._routed(request), size)

    def _routed(self, request: Request) -> Request:
        """Return the request with the routing key of the program, so that its prefix is cached where it runs."""
        return replace(
            request, fields={ROUTING_KEY_FIELD: self.server.route(self.executor), **request.fields}
        )

    def _fork(self, request: Request, size: int) -> tuple[Result, Sequence[ProgramEngine]]:
        source, prefix = self.executor, request.input_ids
        copy = StreamExecutor(
            source.backend, source.arguments, source.default_sampling_para, source.chat_template, stream=False
        )
        try:
            copy.text_ = self.tokenizer.decode(prefix)
            copy.variables = {**source.variables, TOKENS_VARIABLE: ProgramTokens(copy.text_, prefix)}
            copy.messages_, copy.cur_role = list(source.messages_), source.cur_role
            copy.cur_role_begin_pos = source.cur_role_begin_pos
            self.server.pending_commits[copy.sid] = request
            group = ProgramState(copy).fork(size)
            committed = self.server.commit_results.pop(copy.sid, None)
            if copy.error_ is not None:
                raise copy.error_
            if committed is None:
                raise EngineError("SGLang forked the program without committing its prefix")
        finally:
            copy.end()
            self.server.pending_commits.pop(copy.sid, None)
        return committed, [ProgramEngine(self.server, s.stream_executor, s) for s in group.states]

    async def release(self) -> None:
        if self.state is not None:
            self.executor.end()

    async def abort(self, rid: str) -> None:
        await self.server.http.abort(rid)

    async def load(self) -> Load:
        return await self.server.http.load()


def resolve_future(done: asyncio.Future[Result], result: Result | None, error: BaseException | None) -> None:
    """Give a decode call its result or its error, unless it was cancelled meanwhile."""
    if done.done():
        return
    if error is not None:
        done.set_exception(error if isinstance(error, Exception) else EngineError("the branch was cancelled"))
    elif result is not None:
        done.set_result(result)
