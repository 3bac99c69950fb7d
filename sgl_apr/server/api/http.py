"""How answers go out: JSON, server-sent events, errors in OpenAI's shape, and clients that leave; no plan in here."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from fastapi import Response
from fastapi.responses import StreamingResponse

from sgl_apr.errors import AprError, EngineError, EngineTimeout
from sgl_apr.server.api.limits import ServerBusy

T = TypeVar("T")
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
HTTP_CLIENT_CLOSED_REQUEST = 499  # nobody reads it
RETRY_AFTER = "1"  # seconds
log = logging.getLogger(__name__)


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(content), status, headers, "application/json")


def as_error(error: BaseException) -> Response:
    """The answer to a request that failed."""
    body, status = error_body(error)
    return as_json(body, status, {"Retry-After": RETRY_AFTER} if isinstance(error, ServerBusy) else None)


def error_body(error: BaseException) -> tuple[dict[str, Any], int]:
    """An error in OpenAI's shape, and its status: 4xx for what the client can change, else 5xx."""
    if isinstance(error, ServerBusy):
        status = 503
    elif isinstance(error, EngineTimeout):
        status = 504
    elif isinstance(error, EngineError):  # 409 is between the loop and the cache
        status = error.status if error.status and 400 <= error.status < 600 and error.status != 409 else 500
    elif isinstance(error, AprError):
        status = 400
    else:
        log.error("a trajectory failed", exc_info=error)
        status = 500
    known = isinstance(error, AprError)
    code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower() if known else "internal_error"
    kind = "invalid_request_error" if status < 500 else "server_error"
    text = str(error) if known else "internal server error"
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}, status


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None, with `work` cancelled, if the client leaves before."""
    task, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events, one for each object; closes their source as soon as the client leaves."""

    def __init__(self, first: Any, rest: AsyncGenerator[Any, None]) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(_lines(first, rest), media_type="text/event-stream", headers=headers)
        self._source = rest

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        try:
            await run_until_disconnect(receive, self.stream_response(send))
        finally:
            await self._source.aclose()


async def event_stream(receive: Receive, objects: AsyncGenerator[Any, None]) -> Response:
    """A stream of objects; an error before the first of them is an answer of its own."""
    first = await run_until_disconnect(receive, anext(objects))
    if first is None:
        await objects.aclose()
        return Response(status_code=HTTP_CLIENT_CLOSED_REQUEST)
    return EventStream(first, objects)


async def _lines(first: Any, rest: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    try:
        yield _line(first)
        async for item in rest:
            yield _line(item)
    except Exception as error:
        yield _line(error_body(error)[0])
    yield b"data: [DONE]\n\n"


def _line(item: Any) -> bytes:
    return b"data: " + orjson.dumps(item) + b"\n\n"
