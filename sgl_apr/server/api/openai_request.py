"""A request of OpenAI's API as SGLang reads it, made into a prompt and a plan; it is answered elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException

from sgl_apr.errors import AprError, EngineError
from sgl_apr.runtime.options import REQUEST_FIELDS, ReasonOptions
from sgl_apr.server.api.openai_response import ResponseOptions
from sgl_apr.server.api.options import SAMPLING, RequestParser, check_type, drop_nulls

ALONE = "a trajectory is one reply"
MASK = "the dialect's grammar constrains decoding"
STOPS = "where a reply stops is for its dialect to say"
UNKNOWN = "a trajectory has none"
UNSUPPORTED_FIELDS: Mapping[str, str] = {
    "n": ALONE, "best_of": ALONE, "echo": ALONE, "suffix": ALONE, "session_id": ALONE, "session_params": ALONE,
    "tools": MASK, "response_format": MASK, "regex": MASK, "ebnf": MASK, "json_schema": MASK,
    "stop": STOPS, "stop_token_ids": STOPS, "stop_regex": STOPS, "min_tokens": STOPS, "ignore_eos": STOPS,
    "logprobs": UNKNOWN, "top_logprobs": UNKNOWN, "return_hidden_states": UNKNOWN, "return_routed_experts": UNKNOWN,
    "custom_logit_processor": MASK, "custom_params": MASK, "watermark": MASK,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReasonRequest:
    """A prompt, what is asked behind it, and how the answer is to look."""

    prompt: tuple[int, ...]
    plan: ReasonOptions
    options_: ResponseOptions


async def parse_openai_request(
    parser: RequestParser, serving: Any, request: Any, raw_request: Any, options: Any, *, chat: bool
) -> ReasonRequest:
    """Read a request with SGLang's own object for its route: templates, defaults and adapters are its matter.

    `options` is what the body has under `apr`; a field that both have is taken from there. Raises an
    `AprError` for what cannot be had together with `apr`, or at all.
    """
    options = drop_nulls(check_type("apr", options, dict))
    options_ = _response_options(options, request)
    for name, reason in UNSUPPORTED_FIELDS.items():
        value = getattr(request, name, None)
        if value and value != type(request).model_fields[name].default:
            raise AprError(f"{name} cannot be had with apr: {reason}")
    generate = await _generate_request(serving, request, raw_request)
    if any(getattr(generate, f"{kind}_data") for kind in ("image", "video", "audio")):
        raise AprError("images, video and audio cannot be had with apr")
    given_as = generate.input_ids if generate.text is None else generate.text
    alone = isinstance(given_as, list) and len(given_as) == 1 and not isinstance(given_as[0], int)
    prompt = parser.prompt(given_as[0] if alone else given_as)
    named = {"seed": request.seed, **{name: getattr(generate, name) for name in REQUEST_FIELDS}}
    carried = {k: v for k, v in generate.sampling_params.items() if k in SAMPLING}
    sampling = {**drop_nulls(carried), **check_type("sampling", options.pop("sampling", {}), dict)}
    limit = getattr(request, "max_completion_tokens", None) or (
        request.max_tokens if "max_tokens" in request.model_fields_set else None
    )
    plan = parser.plan(
        {**named, **options, "sampling": sampling},
        len(prompt),
        most=limit,
        wrap=_wrap(serving, request) if chat else None,
    )
    return ReasonRequest(prompt, plan, options_)


def _response_options(options: dict[str, Any], request: Any) -> ResponseOptions:
    """How to answer, taken out of the options."""
    stream = options.pop("stream", "all")
    if stream not in ("all", "trunk"):
        raise AprError(f'apr stream={stream!r}, expected "all" or "trunk"')
    separate = check_type("separate", options.pop("separate", False), bool)
    if separate and request.stream:
        raise AprError("separate cannot be streamed: which text is the answer is known at the end")
    whole = check_type("trajectory", options.pop("trajectory", False), bool)
    usage = bool(request.stream_options and request.stream_options.include_usage)
    return ResponseOptions(separate, whole, stream == "trunk", usage)


async def _generate_request(serving: Any, request: Any, raw_request: Any) -> Any:
    """The GenerateReqInput that SGLang would send; in a thread, as there."""
    if message := serving._validate_request(request):
        raise AprError(message)
    try:
        found, _ = await asyncio.to_thread(serving._convert_to_internal_request, request, raw_request)
    except HTTPException as error:
        raise EngineError(str(error.detail), error.status_code) from error
    except ValueError as error:
        raise AprError(str(error)) from error
    return found


def _wrap(serving: Any, request: Any) -> Callable[[str], str] | None:
    """Makes a prompt of the message of a branch with a context of its own, as the chat template does."""
    tokenizer = serving.tokenizer_manager.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return None

    def wrap(message: str) -> str:
        kind = {**serving.default_chat_template_kwargs, **(request.chat_template_kwargs or {})}
        turn = {"conversation": [{"role": "user", "content": message}], "add_generation_prompt": True}
        text = str(tokenizer.apply_chat_template(**{**kind, **turn, "tokenize": False}))
        # What encodes it begins every prompt with a BOS, if this tokenizer has it so.
        return text.removeprefix(tokenizer.bos_token or "") if serving._tokenizer_auto_adds_specials else text

    return wrap
