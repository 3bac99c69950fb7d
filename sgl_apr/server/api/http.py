"""Handles HTTP: our routes, errors as responses, event streams, and clients that disconnect."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import asdict, replace
from typing import Any, ParamSpec, TypeVar

import orjson
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from sgl_apr.engine.sglang_names import CACHE_MISS_STATUS
from sgl_apr.errors import AprError, EngineError, EngineTimeout
from sgl_apr.formats.dialects import dialect, dialect_names
from sgl_apr.formats.presets import dialect_for
from sgl_apr.runtime.event_json import event_to_json
from sgl_apr.runtime.options import DEFAULT_DIALECT
from sgl_apr.server.api.admission import ServerBusy
from sgl_apr.server.api.choices import make_choices, run_choices, stream_choices
from sgl_apr.server.api.config import merge_options
from sgl_apr.server.api.openai_request import OpenAIRequest, parse_openai_request
from sgl_apr.server.api.openai_response import OpenAIResponseBuilder
from sgl_apr.server.api.options import ReasonRequest
from sgl_apr.server.api.response_options import ResponseOptions
from sgl_apr.server.api.service import TrajectoryService
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.views.page import render_live_page

P = ParamSpec("P")
T = TypeVar("T")
HTTP_CLIENT_CLOSED_REQUEST = 499  # nobody reads it
DIALECT_FIELDS = (
    "name",
    "tags",
    "width",
    "min_width",
    "max_width",
    "max_depth",
    "first_number",
    "branch_context",
    "joins",
    "published_join",
    "policy",
)
log = logging.getLogger(__name__)


def respond_to_errors(handler: Callable[P, Awaitable[Response]]) -> Callable[P, Awaitable[Response]]:
    """Make a handler return a response for every exception that it raises."""

    @functools.wraps(handler)
    async def handle(*args: P.args, **kwargs: P.kwargs) -> Response:
        try:
            return await handler(*args, **kwargs)
        except ClientDisconnect:
            return Response(status_code=HTTP_CLIENT_CLOSED_REQUEST)
        except Exception as error:
            body, status = error_body(error)
            headers = {"Retry-After": str(error.retry_after)} if isinstance(error, ServerBusy) else None
            return _json_response(body, status, headers)

    return handle


@respond_to_errors
async def openai_completion(
    serving: Any,
    request: Any,
    raw_request: Request,
    body: Mapping[str, Any],
    apr: Any,
    *,
    model: str,
    chat: bool,
) -> Response:
    """Handle a chat completion or text completion that is a trajectory.

    Args:
        serving: SGLang's serving object of the route.
        request: SGLang's request object.
        raw_request: The HTTP request.
        body: The fields of the request as they were sent.
        apr: The options of the trajectory: the field `apr`.
        model: The name of the model in the response.
        chat: Whether this is a chat completion.
    """
    service: TrajectoryService = raw_request.app.state.apr
    parsed = await parse_openai_request(serving, request, raw_request, body, apr, service.config, chat=chat)
    response = await _response_builder(service, parsed, model, chat)
    choices = make_choices(await service.check(parsed.request), parsed.choices)
    if parsed.request.stream:
        chunks = response.chunks(choices, stream_choices(service, choices))
        return await event_stream(raw_request.receive, chunks)
    trajectories = await run_until_disconnect(raw_request.receive, run_choices(service, choices))
    return _json_response(response.completion(trajectories))


async def _response_builder(
    service: TrajectoryService, parsed: OpenAIRequest, model: str, chat: bool
) -> OpenAIResponseBuilder:
    tokenizer = (await service.engine()).tokenizer if parsed.response.logprobs else None
    return OpenAIResponseBuilder(model, chat, parsed.response, tokenizer)


@respond_to_errors
async def generate(request: Request) -> Response:
    """Return the trajectory of `prompt` (text) or `input_ids`. The body has the options, too.

    The response is the JSON of the trajectory (`apr.Trajectory.from_json`), or with `"stream": true` its events
    (`sgl_apr.runtime.event_from_json`).
    """
    service: TrajectoryService = request.app.state.apr
    reason_request = ReasonRequest.from_json(await request.body())
    defaults = dict(service.config.default_options)
    ResponseOptions.pop_from(defaults)
    reason_request = replace(reason_request, options=merge_options(defaults, reason_request.options))
    if reason_request.stream:
        return await event_stream(request.receive, _event_objects(service.stream(reason_request)))
    trajectory = await run_until_disconnect(request.receive, service.run(reason_request))
    return _json_response(orjson.Fragment(trajectory.to_json()))


async def _event_objects(
    events: AsyncGenerator[Any, None],
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(events):
        async for event in events:
            if not isinstance(event, Trajectory):
                yield event_to_json(event)


@respond_to_errors
async def dialects(request: Request) -> Response:
    """Return every dialect with its tags and defaults, the dialect of a request that names none, and whether the model
    has a chat template."""
    service: TrajectoryService = request.app.state.apr
    default = dialect_for((await service.engine()).tokenizer)
    known = [dialect(name) for name in dialect_names()]
    return _json_response(
        {
            "default": default.name if default else DEFAULT_DIALECT,
            "chat_template": service.has_chat_template,
            "dialects": [{name: getattr(d, name) for name in DIALECT_FIELDS} for d in known],
        }
    )


@respond_to_errors
async def stats(request: Request) -> Response:
    """Return the counts since the launch, the operator's limits, and what the engine supports."""
    service: TrajectoryService = request.app.state.apr
    engine = await service.engine()
    return _json_response(
        {
            **service.counters.to_json(),
            "default_options": service.config.default_options,
            "limits": asdict(service.config.limits),
            "joins_kv": engine.joins_kv,
            "grammar_backend": engine.grammar_backend,
            "supports_seeds": engine.supports_seeds,
        }
    )


async def ui(request: Request) -> Response:
    """Return a page that sends requests to `/apr/generate` and draws the trajectory while it is written."""
    headers = {
        "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "frame-ancestors 'none'",
    }  # fmt: skip
    return Response(render_live_page(), headers=headers, media_type="text/html")


def error_body(error: BaseException) -> tuple[dict[str, Any], int]:
    """Return an error as OpenAI's error object, and its HTTP status.

    The status is 4xx if the client can mend the request, else 5xx. The object's `code` is the name of the exception.
    """
    if isinstance(error, ServerBusy):
        status = 503
    elif isinstance(error, EngineTimeout):
        status = 504
    elif isinstance(error, EngineError):
        status = error.status or 500
        # A cache miss has a meaning only between the runtime and the cache.
        if not 400 <= status < 600 or status == CACHE_MISS_STATUS:
            status = 500
    elif isinstance(error, AprError):
        status = 400
    else:
        log.error("a trajectory failed", exc_info=error)
        status = 500
    message, code = "internal server error", "internal_error"
    if isinstance(error, AprError):
        message, code = str(error), re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}, status


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


async def event_stream(receive: Receive, objects: AsyncGenerator[Any, None]) -> Response:
    """Return a response that streams JSON objects as server-sent events.

    It waits for the first object, so that an error before it becomes a response with an error status.
    """
    return EventStream(await run_until_disconnect(receive, anext(objects)), objects)


class EventStream(StreamingResponse):
    """Server-sent events, one per object. It closes the generator of the objects when the client disconnects."""

    def __init__(self, first: Any, remaining: AsyncGenerator[Any, None]) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(_event_lines(first, remaining), media_type="text/event-stream", headers=headers)
        self._objects = remaining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):
                await run_until_disconnect(receive, self.stream_response(send))
        finally:
            await self._objects.aclose()


async def _event_lines(first: Any, remaining: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    try:
        yield _event_line(first)
        async for item in remaining:
            yield _event_line(item)
    except Exception as error:
        yield _event_line(error_body(error)[0])
    yield b"data: [DONE]\n\n"


def _event_line(item: Any) -> bytes:
    return b"data: " + orjson.dumps(item) + b"\n\n"


def _json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")
