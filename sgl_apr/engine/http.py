"""An engine that sends token ids to an SGLang server over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, get_args

import aiohttp

from sgl_apr.engine.base import Load, Request, Result, TokenSink
from sgl_apr.engine.circuit_breaker import CircuitBreaker
from sgl_apr.engine.http_errors import error_message, translate_errors
from sgl_apr.engine.http_response import (
    JSON_HEADERS,
    data_lines,
    decode_body,
    encode_body,
    read_error,
    read_json,
)
from sgl_apr.engine.http_session import open_session
from sgl_apr.engine.logprobs import CollectedLogprobs, logprob_fields
from sgl_apr.engine.routing import (
    ROUTING_KEY_FIELD,
    ROUTING_KEY_HEADER,
    dp_rank,
    dropped_by_router,
    routing_key,
)
from sgl_apr.engine.server_requests import ServerRequests, rank_count, request_ids
from sgl_apr.engine.server_url import normalize_url
from sgl_apr.engine.sglang_names import RADIX_CACHE_BACKEND
from sgl_apr.engine.sglang_request import (
    check_chunk,
    check_finished,
    id_limit,
    make_result,
    new_token_ids,
    stream_interval,
    sum_loads,
    with_layout,
)
from sgl_apr.engine.step_timer import StepTimer
from sgl_apr.engine.unexpected_answer import unexpected
from sgl_apr.engine.worker_group import WorkerGroupEngine, group_kinds
from sgl_apr.errors import EngineError, UnsupportedEngine
from sgl_apr.formats.masks.writer import GrammarBackend
from sgl_apr.tokenizer import Tokenizer, load_tokenizer

PROBE_S = 20.0  # a healthy SGLang takes a second or more: it looks once a second whether it decoded anything
LOAD_TTL_S = 0.5  # how long a reported load is used


class HttpEngine(ServerRequests, WorkerGroupEngine):
    """A running SGLang server. It belongs to the event loop in which it was connected.

    Examples:
        >>> async with await HttpEngine.connect("http://127.0.0.1:30000") as engine:  # doctest: +SKIP
        ...     await apr.areason(engine, "Question: ...")
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        tokenizer: Tokenizer,
        timeout: float,
        reconnect_timeout: float,
    ) -> None:
        self.url, self._session, self._tokenizer, self._timeout = url, session, tokenizer, timeout
        self._circuit, self._step_timer = CircuitBreaker(url, self._health, reconnect_timeout), StepTimer()
        self._replicas: list[str] | None = None  # the replicas of a router, None if the server is none
        self._ranks = 1
        self._active_rids: set[str] = set()
        self._open: set[aiohttp.ClientResponse] = set()
        self._aborts: dict[str, asyncio.Task[None]] = {}
        self._loading: asyncio.Task[Load] | None = None
        self._load_expires_at = 0.0
        self.grammar_backend: GrammarBackend = "llguidance"
        self.supports_seeds = self.joins_kv = self.resumes_grammar = False
        self.context: int | None = None

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        api_key: str | None = None,
        tokenizer: Tokenizer | None = None,
        timeout: float = 120.0,
        reconnect_timeout: float = 0.0,
    ) -> Self:
        """Connect to a server and load its tokenizer from the path or hub id that it reports.

        Args:
            url: The server, or SGLang's router. `http://` may be left out. The replicas of a router have to be reachable from here too.
            api_key: Sent as a bearer token.
            tokenizer: The model's tokenizer, if it cannot be loaded from the path that the server reports.
            timeout: The longest time, in seconds, between two chunks of a response.
            reconnect_timeout: How many seconds requests wait for a server that is down (see `CircuitBreaker`).

        Raises:
            EngineError: There is no SGLang server at `url` now.
            UnsupportedEngine: The server has another grammar backend, or its tokenizer cannot be loaded here.
        """
        url = normalize_url(url)
        session = open_session(api_key, timeout)
        engine = cls(url, session, tokenizer, timeout, reconnect_timeout)  # type: ignore[arg-type]  # set below, before it is returned
        try:
            info, server = await engine._fetch_server_info()
            backend = server.get("grammar_backend")
            if backend not in get_args(GrammarBackend):
                raise UnsupportedEngine(
                    f"{url} runs --grammar-backend {backend}, expected {' or '.join(get_args(GrammarBackend))} "
                    "(`sgl-apr serve` sets it)"
                )
            engine.grammar_backend = backend  # type: ignore[assignment]  # just checked
            engine.supports_seeds = bool(server.get("enable_deterministic_inference"))
            engine.joins_kv = server.get("radix_cache_backend") == RADIX_CACHE_BACKEND
            engine.resumes_grammar, engine.groups = engine.joins_kv, group_kinds(server)
            engine.default_interval = stream_interval(server.get("stream_interval"))
            engine.tool_call_parser = server.get("tool_call_parser") or None
            engine.context = await engine._context()
            if tokenizer is None:
                path = info.get("tokenizer_path")
                if not isinstance(path, str) or not path:
                    raise unexpected(url, "tokenizer_path", repr(path)[:60], "a directory or hub id")
                tokenizer = load_tokenizer(path)
            engine._tokenizer = tokenizer
        except BaseException:
            await session.close()
            raise
        return engine

    async def _fetch_server_info(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the server's model information and its own. A router has neither, so its replicas are queried."""
        try:
            info, server = await self._describe_server(self.url)
        except EngineError as error:
            if error.status != 404:
                raise
            self._replicas = await self._healthy_workers()
            results = await asyncio.gather(
                *map(self._describe_server, self._replicas), return_exceptions=True
            )
            descriptions = [result for result in results if not isinstance(result, BaseException)]
            if not descriptions:
                why = results[0] if results else "none of them is healthy"
                raise UnsupportedEngine(
                    f"{self.url} is a router, and its replicas have to be reachable from here too: {why}"
                ) from error
            info, server = descriptions[0]  # all replicas are alike
            server["radix_cache_backend"] = None  # the router drops layouts, so nothing can be joined
        self._ranks = rank_count(self.url, server, "dp_size") * rank_count(self.url, server, "attn_dp_size")
        return info, server

    async def close(self) -> None:
        """Abort running requests, which then fail, and close the connections."""
        await self._circuit.close()
        await self.abort("")
        for response in self._open:  # readers would wait on if only the session were closed
            response.close()
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _servers(self) -> list[str]:
        """Return the servers to send to what a router does not forward."""
        return [self.url] if self._replicas is None else self._replicas

    async def load(self) -> Load:
        """Return how busy the server is, at most `LOAD_TTL_S` ago. Concurrent calls share one request."""
        if self._loading is None or (self._loading.done() and time.monotonic() >= self._load_expires_at):
            self._loading = asyncio.create_task(self._load())
        loading = self._loading
        try:
            return await asyncio.shield(loading)
        except BaseException:
            if self._loading is loading and loading.done():  # its traceback would keep the callers alive
                self._loading = None
            raise

    async def _load(self) -> Load:
        with self._errors():
            if self._replicas is not None:  # the router may have gained or lost some
                self._replicas = await self._healthy_workers()
            loads = await asyncio.gather(*map(self._loads, self._servers()))
            if not (ranks := [rank for server_ranks in loads for rank in server_ranks]):
                raise EngineError(f"no replica of {self.url} reports its load")
            load = sum_loads(ranks, self._step_timer.steps, self.url)
        self._load_expires_at = time.monotonic() + LOAD_TTL_S
        return load

    async def _health(self) -> None:
        limit = aiohttp.ClientTimeout(total=PROBE_S)
        async with self._session.get(f"{self.url}/health", timeout=limit, allow_redirects=False) as response:
            if response.status != 200:
                raise EngineError(f"{self.url}/health answered {response.status}", response.status)

    async def post(self, body: Mapping[str, Any]) -> Any:
        """Send a `/generate` request of SGLang without streaming and return its JSON.

        Raises:
            EngineError: The server did not answer, or answered with an error.
        """
        async with self._answer(body) as response:
            async with asyncio.timeout(self._timeout):
                return await read_json(response)

    async def events(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Send a `/generate` request and yield its chunks. Closing the generator early aborts it on the server.

        Raises:
            EngineError: The server failed, or aborted the request.
        """
        meta: dict[str, Any] = {}
        received, at = 0, 0.0
        async with self._answer({**body, "stream": True}) as response:
            async for line in data_lines(response, self._timeout):
                data = decode_body(line)
                meta = check_chunk(self.url, data)
                if (tokens := meta["completion_tokens"]) > received:
                    now = time.monotonic()
                    if received:
                        self._step_timer.record_step(tokens - received, now - at)
                    received, at = tokens, now
                yield data
        check_finished(self.url, meta)

    async def _generate(
        self, request: Request, sampling: Mapping[str, Any], on_tokens: TokenSink | None
    ) -> Result:
        # Streaming even without `on_tokens`: the server then notices at once that a client is gone.
        body = {
            **request.fields,
            "rid": request.rid,
            "input_ids": list(request.input_ids),
            "sampling_params": with_layout(sampling, request.layout),
            **logprob_fields(request),
        }
        received, logprobs = list[int](), CollectedLogprobs(self.url, request.on_top_logprobs)
        meta: dict[str, Any] = {}
        async with contextlib.aclosing(self.events(body)) as events:
            async for data in events:
                meta = data["meta_info"]
                new = new_token_ids(self.url, data, len(received), id_limit(self._tokenizer))
                received += new
                logprobs.add(meta)
                if new and on_tokens:
                    on_tokens(new)
        return make_result(self.url, received, logprobs, meta, request)

    async def _group_chunks(self, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
        async with self._answer({**body, "stream": True}) as response:
            async for line in data_lines(response, self._timeout):
                yield decode_body(line)

    def _response_limits(self) -> tuple[str, int]:
        return self.url, id_limit(self._tokenizer)

    @contextlib.asynccontextmanager
    async def _answer(self, body: Mapping[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a `/generate` request and yield its response, if its status is 200."""
        await self._circuit.wait_until_up()
        body, headers = self._with_routing(body)
        rids = request_ids(body)
        with self._abort_on_error(rids), self._step_timer.running(max(1, len(rids))):
            post = self._session.post(
                f"{self.url}/generate",
                data=encode_body(body),
                headers={**JSON_HEADERS, **headers},
                allow_redirects=False,
            )
            limit = self._timeout + (self._session.timeout.sock_connect or 0.0)
            with self._errors():
                async with asyncio.timeout(limit) as until_headers, post as response:
                    if response.status != 200:
                        raise EngineError(
                            error_message(await read_error(response), response.status), response.status
                        )
                    until_headers.reschedule(None)
                    self._open.add(response)
                    try:
                        yield response
                    finally:
                        self._open.discard(response)

    def _with_routing(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the body and headers that route a request to the replica and rank of its trajectory."""
        body, direct = dict(body), self._replicas is None
        key = body.pop(ROUTING_KEY_FIELD, None) or routing_key(next(iter(request_ids(body)), ""))
        if not direct and (names := dropped_by_router(body)):
            raise UnsupportedEngine(f"{self.url} is a router, which does not forward {', '.join(names)}")
        if self._ranks > 1 and key:
            name = "routed_dp_rank" if direct else "data_parallel_rank"  # a router only knows the older name
            body.setdefault(name, dp_rank(key, self._ranks))
        return body, {ROUTING_KEY_HEADER: key} if key else {}

    @contextlib.contextmanager
    def _abort_on_error(self, rids: Sequence[str]) -> Iterator[None]:
        """Start to abort requests on the server unless the block ends without an exception.

        Where the server names the requests of a batch, there are none: it notices that the client is gone.
        """
        self._active_rids.update(rids)
        try:
            yield
        except BaseException:
            for rid in rids:
                self._abort_soon(rid)
            raise
        finally:
            self._active_rids.difference_update(rids)

    def _errors(self, url: str = "") -> contextlib.AbstractContextManager[None]:
        """Translate exceptions of the HTTP library. Failed connections to a replica do not open the circuit."""
        url = url or self.url
        on_failure = self._circuit.record_failure if url == self.url else None
        connect_s = self._session.timeout.sock_connect or 0.0
        return translate_errors(url, connect_s, self._timeout, on_failure)
