"""Parses a request of OpenAI's API that has an object `apr`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fastapi import HTTPException

from sgl_apr.errors import AprError, EngineError
from sgl_apr.runtime.option_checks import GRAMMAR, NOT_AVAILABLE, ONE_REPLY, REQUEST_FIELDS, STOP
from sgl_apr.runtime.value_checks import SAMPLING_TYPES, check_type, drop_nulls
from sgl_apr.server.api.config import merge_options
from sgl_apr.server.api.openai_response import ResponseOptions
from sgl_apr.server.api.options import ReasonRequest

NO_CHAT_TEMPLATE = (
    "the model has no chat template, so the server cannot make a prompt of messages: send text to /v1/completions, or "
    "start the server with --chat-template"
)
UNSUPPORTED_FIELDS: Mapping[str, str] = {
    "n": ONE_REPLY, "best_of": ONE_REPLY, "echo": ONE_REPLY, "suffix": ONE_REPLY, "session_id": ONE_REPLY,
    "session_params": ONE_REPLY,
    "tools": GRAMMAR, "response_format": GRAMMAR, "regex": GRAMMAR, "ebnf": GRAMMAR, "json_schema": GRAMMAR,
    "custom_logit_processor": GRAMMAR, "custom_params": GRAMMAR, "watermark": GRAMMAR,
    "stop": STOP, "stop_token_ids": STOP, "stop_regex": STOP, "min_tokens": STOP, "ignore_eos": STOP,
    "logprobs": NOT_AVAILABLE, "top_logprobs": NOT_AVAILABLE, "return_hidden_states": NOT_AVAILABLE,
    "return_routed_experts": NOT_AVAILABLE,
}  # fmt: skip


async def parse_openai_request(
    serving: Any,
    request: Any,
    raw_request: Any,
    apr: Any,
    default_options: Mapping[str, Any],
    *,
    chat: bool,
) -> tuple[ReasonRequest, ResponseOptions]:
    """Parse a request.

    SGLang itself applies the chat template, the model's default sampling parameters and the adapter.

    Args:
        serving: SGLang's serving object of the route.
        request: SGLang's `ChatCompletionRequest` or `CompletionRequest`.
        raw_request: The HTTP request.
        apr: The field `apr` of the body. Where it and the request set the same option, it wins.
        default_options: The operator's default options. Both win over these.
        chat: Whether this is a chat completion.

    Returns:
        The request for a trajectory, and how its response should look.

    Raises:
        AprError: The request is not valid, or has a field that does not work together with `apr`.
        EngineError: SGLang refuses the request with an HTTP status.
    """
    own = drop_nulls(check_type("apr", apr, dict))
    if own.get("separate_reasoning") and request.stream:
        raise AprError("separate_reasoning cannot be streamed: the answer is known only at the end")
    if name := uncombinable_field(request):
        raise AprError(f"{name} cannot be combined with apr: {UNSUPPORTED_FIELDS[name]}")
    generate = await _generate_request(serving, request, raw_request)
    if any(getattr(generate, f"{kind}_data") for kind in ("image", "video", "audio")):
        raise AprError("images, video and audio cannot be combined with apr")
    prompt = generate.input_ids if generate.text is None else generate.text
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]  # a batch of one
    sampling = {k: v for k, v in generate.sampling_params.items() if k in SAMPLING_TYPES}
    explicit = {k: v for k, v in sampling.items() if k in request.model_fields_set}
    request_options = {"seed": request.seed, **{name: getattr(generate, name) for name in REQUEST_FIELDS}}
    options = merge_options(
        {"sampling": sampling}, default_options, {"sampling": explicit}, request_options, own
    )
    response_options = replace(
        ResponseOptions.pop_from(options),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
    )
    max_tokens = getattr(request, "max_completion_tokens", None) or (
        request.max_tokens if "max_tokens" in request.model_fields_set else None
    )
    template = _branch_prompt_template(serving, request) if chat else None
    return ReasonRequest(prompt, options, bool(request.stream), max_tokens, template), response_options


def validate_chat_request(original: Any, serving: Any, request: Any) -> str | None:
    """Return what is wrong with a chat request, as SGLang does, or that the model has no chat template."""
    error: str | None = original(serving, request)
    return error or (None if _has_chat_template(serving, request) else NO_CHAT_TEMPLATE)


def _has_chat_template(serving: Any, request: Any) -> bool:
    """Return whether SGLang can make a prompt of the messages of a request."""
    templates = serving.template_manager
    return bool(
        request.input_ids is not None
        or templates.chat_template_name
        or templates.python_chat_template
        or serving.chat_encoding_spec
        or getattr(serving.tokenizer_manager.tokenizer, "chat_template", None)
        or (serving.default_chat_template_kwargs | (request.chat_template_kwargs or {})).get("chat_template")
    )


def uncombinable_field(request: Any) -> str | None:
    """Return the first field of an OpenAI request that cannot be combined with `apr`, or None."""
    for name in UNSUPPORTED_FIELDS:
        value = getattr(request, name, None)
        if value and value != type(request).model_fields[name].default:
            return name
    return None


async def _generate_request(serving: Any, request: Any, raw_request: Any) -> Any:
    """Return SGLang's `GenerateReqInput`. Like SGLang, it applies the chat template in a thread."""
    if message := serving._validate_request(request):
        raise AprError(message)
    try:
        generate, _ = await asyncio.to_thread(serving._convert_to_internal_request, request, raw_request)
    except HTTPException as error:
        raise EngineError(str(error.detail), error.status_code) from error
    except ValueError as error:
        raise AprError(str(error)) from error
    return generate


def _branch_prompt_template(serving: Any, request: Any) -> Callable[[str], str] | None:
    """Return a function that applies the chat template to the message of a branch, if the model has one."""
    tokenizer = serving.tokenizer_manager.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return None
    template_options = {
        **serving.default_chat_template_kwargs,
        **(request.chat_template_kwargs or {}),
        "add_generation_prompt": True,
        "tokenize": False,
    }

    def apply_template(message: str) -> str:
        conversation = [{"role": "user", "content": message}]
        text = str(tokenizer.apply_chat_template(**{**template_options, "conversation": conversation}))
        # Encoding adds the BOS token once more if this tokenizer does that by itself.
        return text.removeprefix(tokenizer.bos_token or "") if serving._tokenizer_auto_adds_specials else text

    return apply_template
