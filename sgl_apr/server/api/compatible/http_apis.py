"""Handles requests of OpenAI's Responses API and of Anthropic's Messages API that are trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response

from sgl_apr.errors import AprError
from sgl_apr.server.api.compatible.messages_request import parse_messages_request
from sgl_apr.server.api.compatible.messages_response import MESSAGE_EVENTS, MessageBuilder, message_error
from sgl_apr.server.api.compatible.responses_request import parse_responses_request, wants_summary
from sgl_apr.server.api.compatible.responses_response import RESPONSE_EVENTS, ResponseBuilder
from sgl_apr.server.api.http_errors import json_response, respond_to_errors, respond_with
from sgl_apr.server.api.http_streams import event_stream, run_until_disconnect
from sgl_apr.server.api.openai.reply_stream import ReplyStream, reply_deltas
from sgl_apr.server.api.openai.request import OpenAIRequest
from sgl_apr.server.api.options import CheckedRequest
from sgl_apr.server.api.service import TrajectoryService


@respond_to_errors
async def openai_response(
    serving: Any, request: Any, raw_request: Request, body: Mapping[str, Any], apr: Any, *, model: str | None
) -> Response:
    """Handle a request of the Responses API.

    Args:
        serving: SGLang's `OpenAIServingResponses`.
        request: SGLang's request object.
        raw_request: The HTTP request.
        body: The fields of the request as they were sent.
        apr: The options of the trajectory: the field `apr`.
        model: The name of the model in the response.
    """
    service: TrajectoryService = raw_request.app.state.apr
    parsed = await parse_responses_request(serving, request, raw_request, body, apr, service.config)
    checked = await _check(service, parsed)
    tokenizer = (await service.engine()).tokenizer if parsed.response.logprobs else None
    builder = ResponseBuilder(
        model or service.model_name, body, parsed.response, wants_summary(body), tokenizer
    )
    if parsed.request.stream:
        deltas = reply_deltas(service.stream(checked), _reply_stream(checked, parsed))
        return await event_stream(raw_request.receive, builder.events(deltas), RESPONSE_EVENTS)
    trajectory = await run_until_disconnect(raw_request.receive, service.run(checked))
    return json_response(builder.response(trajectory))


@respond_with(message_error)
async def anthropic_message(
    serving: Any, request: Any, raw_request: Request, body: Mapping[str, Any], apr: Any, *, model: str
) -> Response:
    """Handle a request of the Messages API.

    Args:
        serving: SGLang's `AnthropicServing`.
        request: SGLang's request object.
        raw_request: The HTTP request.
        body: The fields of the request as they were sent.
        apr: The options of the trajectory: the field `apr`.
        model: The name of the model in the response.
    """
    service: TrajectoryService = raw_request.app.state.apr
    parsed = await parse_messages_request(serving, request, raw_request, body, apr, service.config)
    checked = await _check(service, parsed)
    thinking = request.thinking
    builder = MessageBuilder(model, parsed.response, thinking is None or thinking.display != "omitted")
    if parsed.request.stream:
        deltas = reply_deltas(service.stream(checked), _reply_stream(checked, parsed))
        return await event_stream(raw_request.receive, builder.events(deltas), MESSAGE_EVENTS)
    trajectory = await run_until_disconnect(raw_request.receive, service.run(checked))
    return json_response(builder.message(trajectory))


async def _check(service: TrajectoryService, parsed: OpenAIRequest) -> CheckedRequest:
    if parsed.response.all_sequences:
        raise AprError('apr stream="all" is only for chat completions and text completions')
    return await service.check(parsed.request)


def _reply_stream(checked: CheckedRequest, parsed: OpenAIRequest) -> ReplyStream:
    options = parsed.response
    return ReplyStream(checked.options, separate_reasoning=options.separate_reasoning, stop=options.stop)
