"""Parses a request of OpenAI's Responses API that has an object `apr`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.runtime.value_checks import shorten
from sgl_apr.server.api.config import ApiConfig
from sgl_apr.server.api.openai.fields import CLIENT_TOOLS, IDENTIFIERS, ROUTING, SESSION
from sgl_apr.server.api.openai.request import OpenAIRequest, parse_openai_request
from sgl_apr.server.api.openai.request_fields import FieldTable
from sgl_apr.server.hooks import require_sglang

CHAT_REQUEST = "sglang.srt.entrypoints.openai.protocol:ChatCompletionRequest"
LOGPROBS = "message.output_text.logprobs"
NOT_STORED = "the server stores no responses: send the messages so far as input"
SAME_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "stop",
    "cache_salt", "extra_key", "chat_template_kwargs",
)  # fmt: skip
RESPONSES_FIELDS = FieldTable(
    honoured=(
        "model", "apr", "input", "instructions", "max_output_tokens", "reasoning", "text", "include", "top_logprobs",
        "stream", "stream_options", "priority", *SAME_FIELDS, *IDENTIFIERS,
    ),
    only={
        "store": ((False,), NOT_STORED),
        "background": ((False,), NOT_STORED),
        "service_tier": (("auto", "default"), "the server has one tier; `priority` orders requests"),
        "truncation": (("disabled",), "a prompt that does not fit is refused"),
        "tool_choice": (("auto", "none"), CLIENT_TOOLS),
        "parallel_tool_calls": ((True, False), CLIENT_TOOLS),
        "prompt_cache_retention": (("in_memory",), "the cache of the server is in its memory"),
    },
    refused={
        "tools": CLIENT_TOOLS, "max_tool_calls": '"apr": {"budget": {"tool_calls": N}} limits calls', "previous_response_id": NOT_STORED,
        "conversation": NOT_STORED, "prompt": "the server has no stored prompts", "session_id": SESSION,
        "request_id": "a response has an id of its own",
        "bootstrap_host": ROUTING, "bootstrap_port": ROUTING, "bootstrap_room": ROUTING, "routed_dp_rank": ROUTING,
        "disagg_prefill_dp_rank": ROUTING, "data_parallel_rank": ROUTING,
    },
)  # fmt: skip


async def parse_responses_request(
    serving: Any, request: Any, raw_request: Any, body: Mapping[str, Any], apr: Any, config: ApiConfig
) -> OpenAIRequest:
    """Parse a request. It is converted to a chat completion, and that is parsed.

    Args:
        serving: SGLang's `OpenAIServingResponses`.
        request: SGLang's `ResponsesRequest`.
        raw_request: The HTTP request.
        body: The fields of the request as they were sent.
        apr: The options of the trajectory: the field `apr`.
        config: The operator's settings.

    Raises:
        AprError: The request is not valid, or has a field that does not work together with `apr`.
        EngineError: SGLang refuses the request with an HTTP status.
    """
    RESPONSES_FIELDS.check(body)
    fields = {name: getattr(request, name) for name in SAME_FIELDS if name in request.model_fields_set}
    if "priority" in request.model_fields_set:
        fields["priority"] = request.priority
    reasoning, text = body.get("reasoning") or {}, body.get("text") or {}
    _check_nested(body, reasoning, text)
    try:
        chat = require_sglang(CHAT_REQUEST)(
            model=request.model or raw_request.app.state.apr.model_name,
            messages=serving._construct_input_messages(request, None),
            stream=bool(request.stream),
            max_completion_tokens=request.max_output_tokens,
            reasoning_effort=reasoning.get("effort"),
            response_format=_response_format(text.get("format")),
            logprobs=LOGPROBS in (request.include or ()) or bool(request.top_logprobs),
            top_logprobs=request.top_logprobs or None,
            **fields,
        )
    except ValueError as error:
        raise AprError(" ".join(str(error).split())[:500]) from error
    return await parse_openai_request(serving, chat, raw_request, apr, config, chat=True)


def _check_nested(body: Mapping[str, Any], reasoning: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Check the values inside of fields, of which SGLang ignores some."""
    for name in body.get("include") or ():
        if name != LOGPROBS:
            raise AprError(f'include={shorten(name)} cannot be combined with apr, expected "{LOGPROBS}"')
    for where, value, known in (
        ("reasoning", reasoning, ("effort", "summary", "generate_summary")),
        ("text", text, ("format", "verbosity")),
        ("stream_options", body.get("stream_options") or {}, ("include_obfuscation",)),
    ):
        for name in value:
            if name not in known:
                raise AprError(f"{where} {shorten(name)} cannot be combined with apr")
    if (text.get("verbosity") or "medium") != "medium":
        raise AprError(
            f"text verbosity={shorten(text['verbosity'])} cannot be combined with apr, expected 'medium'"
        )


def _response_format(text_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return `text.format` as the `response_format` of a chat completion."""
    if text_format is None or text_format.get("type") != "json_schema":
        return None if text_format is None else dict(text_format)
    schema = {name: value for name, value in text_format.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}


def wants_summary(body: Mapping[str, Any]) -> bool:
    """Return whether a request asks for a summary of the reasoning."""
    reasoning = body.get("reasoning") or {}
    return reasoning.get("summary") is not None or reasoning.get("generate_summary") is not None
