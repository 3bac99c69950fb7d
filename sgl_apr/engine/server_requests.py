"""Requests to an SGLang server other than those that decode: what it reports, aborts, and chat messages as token ids."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from sgl_apr.engine.circuit_breaker import CircuitBreaker
from sgl_apr.engine.http_errors import error_message
from sgl_apr.engine.http_response import JSON_HEADERS, encode_body, read_error, read_object
from sgl_apr.engine.routing import healthy_worker_urls
from sgl_apr.engine.unexpected_answer import unexpected
from sgl_apr.engine.untrusted_text import encode_untrusted
from sgl_apr.errors import AprError, EngineError, UnsupportedEngine
from sgl_apr.tokenizer import Tokenizer

ABORT_S = 5.0


class ServerRequests(ABC):
    """Sends single requests to a server or its replicas."""

    url: str
    _session: aiohttp.ClientSession
    _tokenizer: Tokenizer
    _replicas: list[str] | None
    _circuit: CircuitBreaker
    _active_rids: set[str]
    _aborts: dict[str, asyncio.Task[None]]

    @abstractmethod
    def _servers(self) -> list[str]:
        """Return the servers to send to what a router does not forward."""

    @abstractmethod
    def _errors(self, url: str = "") -> contextlib.AbstractContextManager[None]:
        """Translate exceptions of the HTTP library."""

    async def abort(self, rid: str) -> None:
        """Abort every request whose id begins with `rid`. Never raises."""
        # The server takes complete ids only. It ignores those of requests that have ended.
        known = [r for r in self._active_rids | self._aborts.keys() if r.startswith(rid)]
        if known:
            await asyncio.wait([self._abort_soon(r) for r in known])

    def _abort_soon(self, rid: str) -> asyncio.Task[None]:
        """Return the task that aborts one request. It is kept until it is done, so callers need not wait for it."""
        task = self._aborts.get(rid)
        # A task that is done but still listed was cancelled.
        if task is None or task.done() or task.cancelling():
            task = self._aborts[rid] = asyncio.create_task(self._abort(rid))
        return task

    async def _abort(self, rid: str) -> None:
        # If no server listens, no request runs. A broken connection alone does not show that.
        if not isinstance(self._circuit.error, aiohttp.ClientConnectorError):
            # A router does not forward aborts, and a replica ignores unknown ids.
            await asyncio.gather(*(self._abort_at(url, rid) for url in self._servers()))
        del self._aborts[rid]

    async def _abort_at(self, url: str, rid: str) -> None:
        limit = aiohttp.ClientTimeout(total=ABORT_S)
        post = self._session.post(f"{url}/abort_request", json={"rid": rid}, timeout=limit)
        # RuntimeError: the session was closed.
        with contextlib.suppress(EngineError, RuntimeError), self._errors(url):
            async with post:
                pass

    async def _get(self, path: str, url: str = "") -> dict[str, Any]:
        url = url or self.url
        with self._errors(url):
            get = self._session.get(url + path, timeout=self._total_timeout(), allow_redirects=False)
            async with get as response:
                if response.status != 200:
                    where = f": {await read_error(response)}" if 300 <= response.status < 400 else ""
                    raise EngineError(f"{url}{path} answered {response.status}{where}", response.status)
                return await read_object(response)

    async def _describe_server(self, url: str) -> tuple[dict[str, Any], dict[str, Any]]:
        return await self._get("/model_info", url), await self._get("/server_info", url)

    async def _context(self) -> int | None:
        """Return the context length of the model, which SGLang reports on OpenAI's route only."""
        try:
            (model, *_) = (await self._get("/v1/models", (self._replicas or [self.url])[0]))["data"]
            return int(model["max_model_len"])
        except (EngineError, KeyError, TypeError, ValueError):
            return None

    async def _loads(self, url: str) -> list[dict[str, Any]]:
        """Return the load of each rank of one server, or nothing for a replica that does not answer."""
        try:
            ranks = (await self._get("/v1/loads", url)).get("loads")
            if not isinstance(ranks, list):
                raise unexpected(url, "loads", type(ranks).__name__, "a list")
        except EngineError:
            if self._replicas is None:
                raise
            return []
        return ranks

    async def _healthy_workers(self) -> list[str]:
        """Return the URLs of the healthy replicas of a router."""
        workers = await self._get("/workers")
        with self._errors():
            return healthy_worker_urls(workers)

    def _total_timeout(self) -> aiohttp.ClientTimeout:
        """The limits of a request whose response comes at once."""
        limits = self._session.timeout
        return aiohttp.ClientTimeout(total=limits.sock_read, sock_connect=limits.sock_connect)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Return the token ids of chat messages, rendered by the server as for a chat completion.

        What users, tools and clients wrote becomes no added token, also if the server is a stock one of SGLang.

        Args:
            messages: The messages in OpenAI's form.
            tools: The tools in OpenAI's form.

        Raises:
            UnsupportedEngine: The model has no chat template.
            AprError: The server refuses the messages.
            EngineError: The server failed.
        """
        return await encode_untrusted(self._tokenizer, messages, tools, self._render_chat)

    async def _render_chat(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        """Return the token ids of messages as SGLang makes them."""
        url = self._servers()[0]
        with self._errors(url):
            post = self._session.post(
                f"{url}/tokenize",
                data=encode_body({"messages": messages, **({"tools": tools} if tools else {})}),
                headers=JSON_HEADERS,
                timeout=self._total_timeout(),
                allow_redirects=False,
            )
            async with post as response:
                if response.status != 200:
                    raise _refusal(
                        error_message(await read_error(response), response.status), response.status
                    )
                tokens = (await read_object(response)).get("tokens")
                if not isinstance(tokens, list) or not all(type(i) is int and i >= 0 for i in tokens):
                    raise unexpected(url, "tokens", repr(tokens)[:60], "a list of token ids")
                return tokens


def _refusal(message: str, status: int) -> AprError:
    if "chat_template is not set" in message or "no chat template" in message.lower():
        return UnsupportedEngine(
            f"the model has no chat template, expected a prompt that is text or token ids, or a server that was "
            f"started with --chat-template ({message})"
        )
    if status >= 500 or status in (401, 403, 404):
        return EngineError(message, status)
    return AprError(f"the chat messages cannot be rendered: {message}")


def request_ids(body: Mapping[str, Any]) -> list[str]:
    """Return the ids of the requests in a body of `/generate`. Empty if the server names them."""
    rid = body.get("rid")
    return list(map(str, rid)) if isinstance(rid, list) else [str(rid)] if rid else []


def rank_count(url: str, server: Mapping[str, Any], field: str) -> int:
    """Return how many ranks a server reports in a field; 1 if it reports none."""
    value = server.get(field) or 1
    if type(value) is not int or value < 1:
        raise unexpected(url, field, repr(value)[:60], "a number of ranks")
    return value
