"""Server-sent events, and clients that disconnect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from sgl_apr.server.api.http_errors import error_body

T = TypeVar("T")


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` and return its result.

    Raises:
        ClientDisconnect: The client disconnected first. `work` is cancelled then.
    """
    task, disconnect = asyncio.create_task(work), asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def plain_event(item: Any) -> bytes:
    """Return a server-sent event without a name, as OpenAI's completions have them."""
    return b"data: " + orjson.dumps(item) + b"\n\n"


def named_event(item: Mapping[str, Any]) -> bytes:
    """Return a server-sent event with the name that is the item's `type`."""
    return b"event: " + str(item["type"]).encode() + b"\n" + plain_event(item)


@dataclass(frozen=True, slots=True)
class EventFormat:
    """How objects are sent as server-sent events.

    Attributes:
        encode: Returns the event of an object.
        error: Returns the object of an error.
        end: What follows the last event.
    """

    encode: Callable[[Any], bytes] = plain_event
    error: Callable[[BaseException], Mapping[str, Any]] = lambda error: error_body(error)[0]
    end: bytes = b"data: [DONE]\n\n"


OPENAI_EVENTS = EventFormat()


async def event_stream(
    receive: Receive, objects: AsyncGenerator[Any, None], events: EventFormat = OPENAI_EVENTS
) -> Response:
    """Return a response that streams JSON objects as server-sent events.

    It waits for the first object, so that an error before it becomes a response with an error status.
    """
    return EventStream(await run_until_disconnect(receive, anext(objects)), objects, events)


class EventStream(StreamingResponse):
    """Server-sent events, one per object. It closes the generator of the objects when the client disconnects."""

    def __init__(self, first: Any, remaining: AsyncGenerator[Any, None], events: EventFormat) -> None:
        headers = {"Cache-Control": "no-cache"}
        lines = _event_lines(first, remaining, events)
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._objects = remaining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):
                await run_until_disconnect(receive, self.stream_response(send))
        finally:
            await self._objects.aclose()


async def _event_lines(
    first: Any, remaining: AsyncGenerator[Any, None], events: EventFormat
) -> AsyncGenerator[bytes, None]:
    try:
        yield events.encode(first)
        async for item in remaining:
            yield events.encode(item)
    except Exception as error:
        yield events.encode(events.error(error))
    if events.end:
        yield events.end
