"""The ASGI middleware that checks every request before SGLang's routes and ours see it."""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import orjson
from jinja2 import TemplateError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgl_apr.server.guard.body_reader import BodyReader, discard_body
from sgl_apr.server.guard.body_validation import list_entries
from sgl_apr.server.guard.json_checks import chat_text, check_json
from sgl_apr.server.guard.json_counter import count_brackets
from sgl_apr.server.guard.limits import MIB, GuardLimits
from sgl_apr.server.guard.model_size import ModelSize
from sgl_apr.server.guard.origin_checks import check_content_type, check_host, check_origin
from sgl_apr.server.guard.query_checks import LOADS_PATH, check_loads_query
from sgl_apr.server.guard.refusal import RequestRefused, over_limit, send_refusal

LARGE_BODY = 128 * 1024  # bytes; a larger body is parsed in a thread
LONG_TEXT = 64 * 1024  # characters; a longer text is counted in a thread
TEXT_BODY_BYTES, MEDIA_BODY_BYTES = 8 * MIB, 64 * MIB
# Bodies of these are weights, which only an operator sends. They are not parsed here.
WEIGHT_PATHS = (
    "/update_weights_from_tensor", "/load_lora_adapter_from_tensors", "/update_weights_from_ipc",
    "/update_weights_from_distributed",
)  # fmt: skip
WEIGHT_FACTOR = 64  # how many times the bytes of another body
# These routes encode the text of a chat in the event loop.
LOOP_ENCODED_PATHS = (
    "/api/chat",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
    "/v1/systemone",
)
STREAM_TYPES = (b"text/event-stream", b"application/x-ndjson")
MAX_CONTEXTS = 2  # how many contexts of text they encode, to refuse it

log = logging.getLogger(__name__)
# The refusal of the current request by a check inside SGLang, which answers in a shape of its own.
inner_refusal: ContextVar[list[RequestRefused] | None] = ContextVar("inner_refusal", default=None)


class RequestGuard:
    """Refuses requests that would stop or delay the server.

    A request that passes reaches the application unchanged, except that its body arrives in one piece.

    Args:
        app: The next ASGI application.
        limits: The operator's limits.
        is_loopback: Whether the server listens on loopback only.
        model_size: Returns the size of the model. It is called once a request has a body.
        count_tokens: Returns how many tokens a text has. It is called in a thread.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: GuardLimits,
        is_loopback: bool,
        model_size: Callable[[], ModelSize],
        count_tokens: Callable[[str], int],
    ) -> None:
        self._app, self._limits, self._is_loopback = app, limits, is_loopback
        self._model_size, self._count_tokens = model_size, count_tokens
        self._reader = BodyReader(limits)
        # One thread: large bodies wait for one another, not the event loop for them.
        self._executor = ThreadPoolExecutor(1, "request-guard")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and hand it to the application."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        path, is_http = scope["path"], scope["type"] == "http"
        has_body = is_http and (
            b"transfer-encoding" in headers or headers.get(b"content-length", b"0").strip(b"0") != b""
        )
        try:
            method = scope["method"] if is_http else "GET"
            check_host(headers, scope["scheme"], self._limits, loopback=self._is_loopback)
            check_origin(headers, scope["scheme"], method, path, self._limits)
            if path == LOADS_PATH and scope["query_string"]:
                check_loads_query(scope["query_string"], self._model_size())
            if has_body:
                check_content_type(headers, path)
                receive = await self._checked_body(headers, path, receive)
        except RequestRefused as refusal:
            if not is_http:
                await send({"type": "websocket.close", "code": 1008, "reason": str(refusal)[:120]})
                return
            incomplete = has_body and refusal.status != 400
            await send_refusal(refusal, path, send, close=incomplete)
            if incomplete:
                await discard_body(receive)
                await send({"type": "http.response.body", "body": b""})
            return
        except ClientDisconnect:
            return
        if not has_body:
            await self._app(scope, receive, send)
            return
        response = _Response(path, send)
        try:
            await self._app(scope, receive, response.send)
        except Exception as error:
            # SGLang means a ValueError to be status 400, but some routes and all streams do not catch it.
            if not response.is_started() and (reason := find_value_error(error)):
                log.warning("%s was answered with status 400", path, exc_info=error)
                note_refusal(RequestRefused(" ".join(str(reason).split())[:500]))
            if not response.is_refused():  # else SGLang's route did not expect the refusal
                raise
            await response.send_refusal()

    async def _checked_body(self, headers: dict[bytes, bytes], path: str, receive: Receive) -> Receive:
        size = self._model_size()
        max_bytes = self._limits.body_bytes or (MEDIA_BODY_BYTES if size.is_multimodal else TEXT_BODY_BYTES)
        is_weights = path in WEIGHT_PATHS
        body = await self._reader.read(headers, receive, max_bytes * (WEIGHT_FACTOR if is_weights else 1))
        is_json = b"json" in headers.get(b"content-type", b"").lower()
        if is_json and not is_weights:
            if len(body) <= LARGE_BODY:
                entries = _check(body, path, self._limits, size, self._count_tokens)
            else:
                loop = asyncio.get_running_loop()
                entries = await loop.run_in_executor(
                    self._executor, _check_large, body, path, self._limits, size, self._count_tokens
                )
            list_entries.set(entries)
        return _replay(body, receive)


def _check(
    body: bytes, path: str, limits: GuardLimits, size: ModelSize, count_tokens: Callable[[str], int]
) -> int:
    """Check a body, and return how many entries its lists have.

    One that is no JSON passes, because SGLang answers it without harm.
    """
    brackets = count_brackets(body) if len(body) > LARGE_BODY else 0
    # Text may have brackets, too, so their number only bounds the memory of the parse.
    if brackets > 8 * limits.json_values:
        raise over_limit(
            "the number of brackets in the body", brackets, "8 x --apr-max-json-values", 8 * limits.json_values
        )  # fmt: skip
    try:
        parsed = orjson.loads(body)
    except ValueError:
        return 0
    entries = check_json(parsed, limits, size)
    if path in LOOP_ENCODED_PATHS and len(body) > LARGE_BODY and isinstance(parsed, dict):
        _check_token_count(chat_text(parsed), size, count_tokens)
    return entries


def _check_large(
    body: bytes, path: str, limits: GuardLimits, size: ModelSize, count_tokens: Callable[[str], int]
) -> int:
    try:
        return _check(body, path, limits, size, count_tokens)
    finally:
        release_memory()


def _check_token_count(text: str, size: ModelSize, count_tokens: Callable[[str], int]) -> None:
    if len(text) <= LONG_TEXT:
        return
    tokens = count_tokens(text)
    if tokens > MAX_CONTEXTS * size.context_length:
        raise RequestRefused(
            f"the messages have {tokens} tokens, expected at most {size.context_length}, the context of the model",
            "messages",
        )


def release_memory() -> None:
    """Give the memory of a large body back to the system, which the C library would keep."""
    with suppress(OSError, AttributeError):  # of another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI function that gives the complete body first, and then what the client does."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


class _Response:
    """Sends a response, or a refusal in place of the response that SGLang made of it.

    SGLang begins a stream before it checks the request. So the start of a stream waits for its first event.
    """

    def __init__(self, path: str, send: Send) -> None:
        self._path, self._send = path, send
        self._refused: list[RequestRefused] = []
        self._held: Message | None = None
        self._started = self._replaced = False
        inner_refusal.set(self._refused)

    def is_started(self) -> bool:
        """Return whether anything of a response was sent."""
        return self._started

    def is_refused(self) -> bool:
        """Return whether the request was refused, and nothing of a response was sent yet."""
        return bool(self._refused) and not self._started

    async def send_refusal(self) -> None:
        """Send the refusal as the response."""
        self._started = self._replaced = True
        await send_refusal(self._refused[0], self._path, self._send, close=False)

    async def send(self, message: Message) -> None:
        """The ASGI function."""
        if self._replaced:
            return
        if message["type"] == "http.response.start" and message["status"] < 400 and _is_stream(message):
            self._held = message
            return
        if self.is_refused() and (self._held or message.get("status", 200) >= 400):
            await self.send_refusal()
            return
        self._started = True
        if self._held:
            held, self._held = self._held, None
            await self._send(held)
        await self._send(message)


def _is_stream(message: Message) -> bool:
    headers = message.get("headers", ())
    return any(k.lower() == b"content-type" and v.startswith(STREAM_TYPES) for k, v in headers)


def find_value_error(error: BaseException) -> Exception | None:
    """Return an exception, or the first one of a group, if it is about a value, as those of chat templates are."""
    if isinstance(error, BaseExceptionGroup):
        return find_value_error(error.exceptions[0])
    return error if isinstance(error, ValueError | TemplateError) else None


def note_refusal(refusal: RequestRefused) -> RequestRefused:
    """Remember the refusal of the current request for its response, and return it to be raised."""
    holder: Any = inner_refusal.get()
    if holder is not None:
        holder.append(refusal)
    return refusal
