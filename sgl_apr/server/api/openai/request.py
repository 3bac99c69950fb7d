"""Parses a request of OpenAI's API that has an object `apr`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sgl_apr.errors import AprError, BudgetExceeded
from sgl_apr.runtime.option_checks import MAX_TOP_LOGPROBS, REQUEST_FIELDS
from sgl_apr.runtime.value_checks import SAMPLING_TYPES, check_type, drop_nulls, shorten
from sgl_apr.server.api.chat.prompt import ChatPrompt, internal_request, make_chat_prompt
from sgl_apr.server.api.chat.template import branch_prompt_template
from sgl_apr.server.api.config import ApiConfig, merge_options
from sgl_apr.server.api.openai.reasoning_effort import effort_options
from sgl_apr.server.api.openai.response_options import ResponseOptions
from sgl_apr.server.api.options import ReasonRequest
from sgl_apr.server.api.tools.request import parse_tools, show_tools

MIN_ROOM = 1024  # tokens of a reply
MAX_STOP_STRINGS, MAX_STOP_CHARS = 16, 256
ANY_OBJECT = '{"type": "object"}'  # the schema of `json_object`


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """A parsed request.

    Attributes:
        request: The request for one trajectory.
        response: How the response should look.
        choices: How many trajectories to run.
        runs_tools: Whether the client runs tools. The request then needs the option `run_tool`.
    """

    request: ReasonRequest
    response: ResponseOptions
    choices: int = 1
    runs_tools: bool = False


async def parse_openai_request(
    serving: Any,
    request: Any,
    raw_request: Any,
    apr: Any,
    config: ApiConfig,
    *,
    chat: bool,
) -> OpenAIRequest:
    """Parse a request.

    SGLang itself applies the chat template, the model's default sampling parameters and the adapter.

    Args:
        serving: SGLang's serving object of the route.
        request: SGLang's `ChatCompletionRequest` or `CompletionRequest`.
        raw_request: The HTTP request. Its application has the operator's tools.
        apr: The options of the trajectory: the field `apr`. Where it and the request set the same option, it wins.
        config: The operator's settings. Its default options are those that neither of both sets.
        chat: Whether this is a chat completion.

    Raises:
        AprError: The request is not valid, or has a field that does not work together with `apr`.
        EngineError: SGLang refuses the request with an HTTP status.
    """
    own = drop_nulls(check_type("apr", apr, dict))
    choices = _parse_choices(request.n, config)
    stop = _parse_stop(request.stop)
    logprobs, top_logprobs = _parse_logprobs(request, chat=chat)
    names = own.pop("tools", config.default_options.get("tools"))
    tools = parse_tools(
        request, await raw_request.json(), names, raw_request.app.state.apr.operator_tools.tools
    )
    if chat:
        show_tools(request, tools)
    made = await _make_prompt(serving, request, raw_request, config, own, chat=chat)
    generate = made.generate
    if any(getattr(generate, f"{kind}_data") for kind in ("image", "video", "audio")):
        raise AprError("images, video and audio cannot be combined with apr")
    prompt = generate.input_ids if generate.text is None else generate.text
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]  # a batch of one
    sampling = {k: v for k, v in generate.sampling_params.items() if k in SAMPLING_TYPES}
    explicit = {k: v for k, v in sampling.items() if k in request.model_fields_set}
    options = merge_options(
        {"sampling": sampling},
        config.default_options,
        effort_options(getattr(request, "reasoning_effort", None), config.limits),
        {"sampling": explicit},
        {"seed": request.seed, **{name: getattr(generate, name) for name in REQUEST_FIELDS}},
        {"logprobs": True, "top_logprobs": top_logprobs} if logprobs else {},
        _separate_reasoning(request),
        own,
    )
    options.pop("tools", None)  # the default
    response = ResponseOptions.pop_from(options, separate_reasoning=chat)
    if response.all_sequences and (stop or logprobs) and request.stream:
        name = "stop" if stop else "logprobs"
        raise AprError(
            f'{name} cannot be combined with apr={{"stream": "all"}}, which streams all that is decoded'
        )
    response = replace(
        response,
        include_usage=includes_usage(request),
        stop=stop,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
    )
    max_tokens = getattr(request, "max_completion_tokens", None) or (
        request.max_tokens if "max_tokens" in request.model_fields_set else None
    )
    template = branch_prompt_template(serving, request) if chat else None
    request_options = drop_nulls(
        {"answer_schema": _answer_schema(request.response_format), "stop": stop or None, **tools.options}
    )
    turn = made.turn and replace(
        made.turn, separate_reasoning=response.separate_reasoning, stop=response.stop
    )
    reason_request = ReasonRequest(
        prompt, options, bool(request.stream), max_tokens, template, request_options, made.layout, turn
    )
    if tools.client and choices > 1:
        raise AprError(f"n={choices} cannot be combined with tools that the client runs, expected n=1")
    if tools.client and logprobs and not response.separate_reasoning:
        raise AprError("logprobs cannot be combined with tools and separate_reasoning=false")
    return OpenAIRequest(reason_request, response, choices, bool(tools.client))


def field_defaults(request: Any) -> dict[str, Any]:
    """Return SGLang's defaults of the fields of a request."""
    return {name: field.default for name, field in type(request).model_fields.items()}


def _parse_choices(n: Any, config: ApiConfig) -> int:
    limit = config.limits.choices
    if not isinstance(n, int) or n < 1:
        raise AprError(f"n={shorten(n)}, expected at least 1")
    if n > limit:
        raise BudgetExceeded(f"n={n} is more than this server allows: --apr-max-choices {limit}")
    return n


def _parse_stop(stop: Any) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else list(stop or ())
    if len(strings) > MAX_STOP_STRINGS:
        raise AprError(f"stop has {len(strings)} texts, expected at most {MAX_STOP_STRINGS}")
    for text in strings:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise AprError(f"stop={shorten(text)}, expected texts of 1 to {MAX_STOP_CHARS} characters")
    return tuple(dict.fromkeys(strings))


def _parse_logprobs(request: Any, *, chat: bool) -> tuple[bool, int]:
    """Return whether the response has log-probabilities, and of how many alternatives of a token."""
    top: Any = request.top_logprobs if chat else request.logprobs
    is_requested = bool(request.logprobs) if chat else request.logprobs is not None
    if chat and top and not is_requested:
        raise AprError(f"top_logprobs={shorten(top)} needs logprobs=true")
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        name = "top_logprobs" if chat else "logprobs"
        raise AprError(f"{name}={shorten(top)}, expected 0 to {MAX_TOP_LOGPROBS}")
    return is_requested, top or 0


def _answer_schema(response_format: Any) -> str | None:
    """Return the JSON schema, as text, that the answer has to fit."""
    kind = getattr(response_format, "type", None)
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        raise AprError(
            f"response_format type={shorten(kind)} cannot be combined with apr, expected json_schema, json_object or text"
        )
    schema = response_format.json_schema and response_format.json_schema.schema_
    if schema is None:
        raise AprError("response_format has no json_schema with a schema")
    return json.dumps(schema, ensure_ascii=False)


def _separate_reasoning(request: Any) -> dict[str, Any]:
    """Return SGLang's own field `separate_reasoning` as an option of the response, if the request has it."""
    is_set = "separate_reasoning" in request.model_fields_set
    return {"separate_reasoning": request.separate_reasoning} if is_set else {}


def includes_usage(request: Any) -> bool:
    """Return whether a stream ends with a chunk that has the usage.

    Raises:
        AprError: The field `stream_options` is not possible.
    """
    options = request.stream_options
    if options is None:
        return False
    if not request.stream:
        raise AprError("stream_options needs stream=true")
    if options.continuous_usage_stats:
        raise AprError("stream_options continuous_usage_stats cannot be combined with apr: use include_usage")
    return bool(options.include_usage)


async def _make_prompt(
    serving: Any,
    request: Any,
    raw_request: Any,
    config: ApiConfig,
    own: Mapping[str, Any],
    *,
    chat: bool,
) -> ChatPrompt:
    """Return SGLang's `GenerateReqInput` with the prompt. Like SGLang, it applies the chat template in a thread."""
    if message := serving._validate_request(request):
        raise AprError(message)
    if not chat:
        return ChatPrompt(await asyncio.to_thread(internal_request, serving, request, raw_request))
    service = raw_request.app.state.apr
    uses_memory = merge_options(config.default_options, own).get("turn_memory", True)
    is_used = check_type("turn_memory", uses_memory, bool) and service.turn_memory.is_on
    memory = service.turn_memory if is_used else None
    parser = await service.parser()
    # A prompt of remembered ids is longer than that of the template, and leaves room for a reply.
    room = min(request.max_completion_tokens or request.max_tokens or MIN_ROOM, parser.context_length // 4)
    max_tokens = parser.context_length - max(1, room)
    return await make_chat_prompt(serving, request, raw_request, parser.tokenizer, memory, max_tokens)
