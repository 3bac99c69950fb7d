"""Parses a request of Anthropic's Messages API that has an object `apr`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.runtime.value_checks import drop_nulls
from sgl_apr.server.api.config import ApiConfig, merge_options
from sgl_apr.server.api.openai.fields import CLIENT_TOOLS, ROUTING
from sgl_apr.server.api.openai.request import OpenAIRequest, parse_openai_request
from sgl_apr.server.api.openai.request_fields import FieldTable

MESSAGES_FIELDS = FieldTable(
    honoured=(
        "model", "apr", "messages", "system", "max_tokens", "temperature", "top_p", "top_k", "stop_sequences", "stream",
        "thinking", "output_config", "metadata", "betas", "cache_control", "user_profile_id", "workspace_id",
    ),
    only={
        "service_tier": (("auto", "standard_only"), "the server has one tier"),
        "speed": (("standard",), "the server has one speed"),
    },
    refused={
        "tools": CLIENT_TOOLS, "tool_choice": CLIENT_TOOLS, "container": "the server has no containers", "diagnostics": "the server has none",
        "inference_geo": "the server is where it is",
        "context_management": "the server edits no contexts", "mcp_servers": "the operator connects MCP servers, with --apr-tools FILE.json",
        "bootstrap_host": ROUTING, "bootstrap_port": ROUTING, "bootstrap_room": ROUTING, "routed_dp_rank": ROUTING,
        "disagg_prefill_dp_rank": ROUTING,
    },
)  # fmt: skip


async def parse_messages_request(
    serving: Any, request: Any, raw_request: Any, body: Mapping[str, Any], apr: Any, config: ApiConfig
) -> OpenAIRequest:
    """Parse a request. SGLang converts it to a chat completion, and that is parsed.

    Args:
        serving: SGLang's `AnthropicServing`.
        request: SGLang's `AnthropicMessagesRequest`.
        raw_request: The HTTP request.
        body: The fields of the request as they were sent.
        apr: The options of the trajectory: the field `apr`.
        config: The operator's settings.

    Raises:
        AprError: The request is not valid, or has a field that does not work together with `apr`.
        EngineError: SGLang refuses the request with an HTTP status.
    """
    MESSAGES_FIELDS.check(body)
    chat = _convert(serving, request)
    chat.stream_options = None  # usage is a part of every stream
    if request.thinking is not None and request.thinking.type == "disabled":
        chat.reasoning_effort = "none"
    own: Any = merge_options(_thinking_options(request), drop_nulls(apr)) if isinstance(apr, dict) else apr
    return await parse_openai_request(serving.openai_serving_chat, chat, raw_request, own, config, chat=True)


def _convert(serving: Any, request: Any) -> Any:
    """Return the chat completion that SGLang makes of a request.

    A model without a thinking mode of its own can think in branches, so SGLang is not asked to switch that mode on or off.
    """
    try:
        try:
            return serving._convert_to_chat_completion_request(request)
        except ValueError:
            if request.thinking is None:
                raise
            return serving._convert_to_chat_completion_request(request.model_copy(update={"thinking": None}))
    except ValueError as error:
        raise AprError(" ".join(str(error).split())[:500]) from error


def _thinking_options(request: Any) -> dict[str, Any]:
    """Return the options of a budget for thinking: a fork leaves the text after its join what the budget leaves."""
    budget = None if request.thinking is None else request.thinking.budget_tokens
    if budget is None:
        return {}
    if budget >= request.max_tokens:
        raise AprError(f"thinking budget_tokens={budget}, expected less than max_tokens={request.max_tokens}")
    return {"budget": {"reserve": 1 - budget / request.max_tokens}}
