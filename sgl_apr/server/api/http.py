"""Handles requests over HTTP: completions that are trajectories, and our own routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any

import orjson
from fastapi import Request, Response

from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import dialect, dialect_names
from sgl_apr.formats.presets import dialect_for
from sgl_apr.runtime.event_json import event_to_json
from sgl_apr.runtime.options import DEFAULT_DIALECT
from sgl_apr.server.api.config import merge_options
from sgl_apr.server.api.http_errors import json_response, respond_to_errors
from sgl_apr.server.api.http_streams import event_stream, run_until_disconnect
from sgl_apr.server.api.method.request import parse_method_request
from sgl_apr.server.api.method.response import MethodResponse
from sgl_apr.server.api.method.service import is_method_request, method_completion
from sgl_apr.server.api.openai.choices import make_choices, run_choices, stream_choices
from sgl_apr.server.api.openai.fields import OPENAI_FIELDS
from sgl_apr.server.api.openai.request import OpenAIRequest, field_defaults, parse_openai_request
from sgl_apr.server.api.openai.response import OpenAIResponseBuilder
from sgl_apr.server.api.openai.response_options import ResponseOptions
from sgl_apr.server.api.options import ReasonRequest
from sgl_apr.server.api.service import TrajectoryService
from sgl_apr.server.api.tools.request import pop_tools
from sgl_apr.server.api.tools.response import turn_chunks, turn_completion
from sgl_apr.server.api.tools.turns import find_turn
from sgl_apr.server.api.worker_group import GROUP_FIELD, check_group_request, run_group, stream_group
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.views.page import render_live_page

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
    OPENAI_FIELDS.check(body, field_defaults(request))
    if is_method_request(apr):
        if not chat:
            raise AprError("a method answers a conversation, expected a chat completion")
        parsed_method = parse_method_request(request, apr, service.config)
        builder = MethodResponse(model, chat, parsed_method.response)
        return await method_completion(service, raw_request, parsed_method, builder)
    parsed = await parse_openai_request(serving, request, raw_request, apr, service.config, chat=chat)
    response = await _response_builder(service, parsed, model, chat)
    if chat and (turn := await find_turn(service, raw_request, body, parsed)) is not None:
        session, events = turn
        if parsed.request.stream:
            return await event_stream(raw_request.receive, turn_chunks(response, session, events))
        completion = turn_completion(response, session, events)
        return json_response(await run_until_disconnect(raw_request.receive, completion))
    choices = make_choices(await service.check(parsed.request), parsed.choices)
    if parsed.request.stream:
        chunks = response.chunks(choices, stream_choices(service, choices))
        return await event_stream(raw_request.receive, chunks)
    trajectories = await run_until_disconnect(raw_request.receive, run_choices(service, choices))
    return json_response(response.completion(trajectories))


async def _response_builder(
    service: TrajectoryService, parsed: OpenAIRequest, model: str, chat: bool
) -> OpenAIResponseBuilder:
    tokenizer = (await service.engine()).tokenizer if parsed.response.logprobs else None
    return OpenAIResponseBuilder(model, chat, parsed.response, tokenizer)


@respond_to_errors
async def generate(request: Request) -> Response:
    """Return the trajectory of `prompt` (text) or `input_ids`. The body has the options, too.

    The response is the JSON of the trajectory (`apr.Trajectory.from_json`), or with `"stream": true` its events
    (`sgl_apr.runtime.event_from_json`). With `group`, workers decode together after the prompt.
    """
    service: TrajectoryService = request.app.state.apr
    reason_request = ReasonRequest.from_json(await request.body())
    if GROUP_FIELD in reason_request.options:
        group = await check_group_request(await service.parser(), service.config, reason_request)
        if reason_request.stream:
            return await event_stream(request.receive, _event_objects(stream_group(service, group)))
        trajectory = await run_until_disconnect(request.receive, run_group(service, group))
        return json_response(orjson.Fragment(trajectory.to_json()))
    defaults = dict(service.config.default_options)
    ResponseOptions.pop_from(defaults)
    options = merge_options(defaults, reason_request.options)
    tools = pop_tools(options, service.operator_tools.tools)
    reason_request = replace(reason_request, options=options, request_options=tools.options)
    if reason_request.stream:
        return await event_stream(request.receive, _event_objects(service.stream(reason_request)))
    trajectory = await run_until_disconnect(request.receive, service.run(reason_request))
    return json_response(orjson.Fragment(trajectory.to_json()))


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
    return json_response(
        {
            "default": default.name if default else DEFAULT_DIALECT,
            "chat_template": service.has_chat_template,
            "dialects": [{name: getattr(d, name) for name in DIALECT_FIELDS} for d in known],
        }
    )


@respond_to_errors
async def tools(request: Request) -> Response:
    """Return the tools that this server runs, as `tools` of OpenAI's API has them. Requests name them in `apr`."""
    service: TrajectoryService = request.app.state.apr
    return json_response({"tools": [tool.to_openai() for tool in service.operator_tools.tools]})


@respond_to_errors
async def stats(request: Request) -> Response:
    """Return the counts since the launch, the operator's limits, and what the engine supports."""
    service: TrajectoryService = request.app.state.apr
    engine = await service.engine()
    return json_response(
        {
            **service.counters.to_json(),
            "default_options": service.config.default_options,
            "limits": asdict(service.config.limits),
            "turn_memory": service.turn_memory.to_json(),
            "joins_kv": engine.joins_kv,
            "groups": sorted(engine.groups),
            "grammar_backend": engine.grammar_backend,
            "supports_seeds": engine.supports_seeds,
            "attention": service.config.attention,
        }
    )


async def ui(request: Request) -> Response:
    """Return a page that sends requests to `/apr/generate` and draws the trajectory while it is written."""
    headers = {
        "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "frame-ancestors 'none'",
    }  # fmt: skip
    return Response(render_live_page(), headers=headers, media_type="text/html")
