"""Puts the checks of this package in front of SGLang's server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from sgl_apr.errors import LaunchError
from sgl_apr.server.guard.body_validation import PureRoutes, body_validation_hooks
from sgl_apr.server.guard.connections import connection_hooks
from sgl_apr.server.guard.limits import GuardLimits
from sgl_apr.server.guard.middleware import LONG_TEXT, RequestGuard, note_refusal
from sgl_apr.server.guard.model_size import ModelSize
from sgl_apr.server.guard.origin_checks import is_loopback
from sgl_apr.server.guard.refusal import MISFIT_ERRORS, RequestRefused, misfit
from sgl_apr.server.guard.request_checks import check_batch, check_request, check_texts
from sgl_apr.server.hooks import hook_around, require_sglang

MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"
REQUESTS = tuple(
    f"sglang.srt.managers.io_struct:{name}" for name in ("GenerateReqInput", "EmbeddingReqInput")
)
TOKEN_IDS = "sglang.api.v1.api_types:decode_TokenIds"
TOKENIZE = "sglang.srt.entrypoints.openai.serving_tokenize"
GENERATE_REQUEST = "sglang.srt.managers.io_struct:GenerateReqInput"
LOAD_SECTIONS = "sglang.srt.managers.load_snapshot:LoadSnapshot.VALID_SECTIONS"
REASONING_PARSERS = "sglang.srt.parser.reasoning_parser:ReasoningParser.DetectorMap"
TOOL_CALL_PARSERS = "sglang.srt.function_call.function_call_parser:FunctionCallParser.ToolCallParserEnum"
TRUNCATED_CONTEXTS = 64  # how long a prompt may be that is cut to one context
UNKNOWN_TOKEN_CHARS = 256  # of the longest token, for a tokenizer that does not list its tokens
DECOMPRESSION_ENV = "SGLANG_ENABLE_REQUEST_DECOMPRESSION"


def install_guard(limits: GuardLimits, host: str) -> None:
    """Check all requests to the server that this process is about to launch.

    Args:
        limits: The operator's limits.
        host: The address that the server listens on.

    Raises:
        LaunchError: SGLang or uvicorn is not as expected.
    """
    server = "sglang.srt.entrypoints.http_server"
    app, state = require_sglang(f"{server}:app"), require_sglang(f"{server}:get_global_state")
    if os.environ.get(DECOMPRESSION_ENV, "").lower() in ("1", "true", "yes", "y"):
        raise LaunchError(f"{DECOMPRESSION_ENV} is not supported: a compressed body may grow without limit")

    @cache
    def model_size() -> ModelSize:
        return measure_model(state().tokenizer_manager)

    def count_tokens(text: str) -> int:
        tokenizer = state().tokenizer_manager.tokenizer
        return 0 if tokenizer is None else len(tokenizer.encode(text, add_special_tokens=False))

    replace_cors(app, limits)
    guard = Middleware(
        RequestGuard,
        limits=limits,
        is_loopback=is_loopback(host),
        model_size=model_size,
        count_tokens=count_tokens,
    )
    app.user_middleware.insert(1 if limits.origins else 0, guard)
    app.user_middleware.append(Middleware(PureRoutes))
    _set_hooks(app, limits, model_size)


def measure_model(manager: Any) -> ModelSize:
    """Return the size of the model of SGLang's tokenizer manager."""
    config = manager.model_config
    # With --allow-auto-truncate, SGLang cuts longer prompts.
    prompt_tokens = config.context_len * (TRUNCATED_CONTEXTS if manager.allow_auto_truncate else 1)
    return ModelSize(
        prompt_tokens,
        prompt_tokens * longest_token(manager.tokenizer),
        config.vocab_size,
        bool(config.is_multimodal),
        bool(require_sglang("sglang.srt.runtime_context:get_memory")().disable_radix_cache),
        {
            "reasoning_parser": frozenset(require_sglang(REASONING_PARSERS)),
            "tool_call_parser": frozenset(require_sglang(TOOL_CALL_PARSERS)),
        },
        frozenset(field.name for field in fields(require_sglang(GENERATE_REQUEST))),
        frozenset(require_sglang(LOAD_SECTIONS)),
    )


def longest_token(tokenizer: Any) -> int:
    """Return how many characters one token of a text can have at most."""
    try:
        return max(map(len, tokenizer.get_vocab()))
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return UNKNOWN_TOKEN_CHARS


def replace_cors(app: Any, limits: GuardLimits) -> None:
    """Replace SGLang's CORS middleware, which lets pages of every origin read every answer, with credentials."""
    stock = [m for m in app.user_middleware if m.cls is CORSMiddleware]
    if len(stock) != 1:
        raise LaunchError(f"SGLang has {len(stock)} CORS middlewares, expected 1")
    app.user_middleware.remove(stock[0])
    if limits.origins:
        any_origin = "*" in limits.origins
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(limits.origins),
            allow_credentials=not any_origin,
            allow_methods=["*"],
            allow_headers=["*"],
        )
        app.user_middleware.insert(0, cors)


def _set_hooks(app: Any, limits: GuardLimits, model_size: Callable[[], ModelSize]) -> None:
    def generate_request(original: Any, manager: Any, obj: Any, *args: Any, **options: Any) -> Any:
        try:
            check_batch(obj, limits)
        except RequestRefused as refusal:
            return _failing(note_refusal(refusal))
        return original(manager, obj, *args, **options)

    def validate_one_request(original: Any, manager: Any, obj: Any, input_ids: Any) -> Any:
        try:
            check_request(obj, input_ids, limits, model_size())
        except RequestRefused as refusal:
            raise note_refusal(refusal) from None
        return original(manager, obj, input_ids)

    paths = [*connection_hooks(limits), *body_validation_hooks(app)]
    hooks: list[tuple[str, list[str], Callable[..., Any]]] = [
        *((f"{kind}.__getitem__", ["i"], _refuse_misfits) for kind in REQUESTS),
        (f"{MANAGER}.generate_request", ["obj", "request"], generate_request),
        (f"{MANAGER}._validate_one_request", ["obj", "input_ids"], validate_one_request),
        (TOKEN_IDS, ["value"], decode_token_ids),
        (f"{MANAGER}._tokenize_texts", ["texts", "is_cross_encoder"], _tokenize_texts),
        (f"{TOKENIZE}:OpenAIServingTokenize._handle_non_streaming_request", ["adapted_request"], _run_large),
        (f"{TOKENIZE}:OpenAIServingDetokenize._handle_non_streaming_request", ["adapted_request"], _run_large),
    ]  # fmt: skip
    for path, parameters, hook in hooks:
        hook_around(path, parameters, hook)
        paths.append(path)
    originals = [require_sglang(path) for path in paths]
    require_sglang("sglang.srt.plugins.hook_registry:HookRegistry").apply_hooks()
    for path, original in zip(paths, originals, strict=True):
        if require_sglang(path) is original:  # SGLang logs a failed hook and continues
            raise LaunchError(f"could not set a hook on {path}")


def decode_token_ids(original: Any, value: Any) -> Any:
    """Decode token ids as SGLang does, whose check of each id takes longer than the rest of a long request."""
    return list(value) if type(value) is list and set(map(type, value)) <= {int} else original(value)


def _refuse_misfits(part: Any, request: Any, i: int) -> Any:
    """Refuse a batch with a list that is shorter than that of its prompts."""
    try:
        return part(request, i)
    except MISFIT_ERRORS as error:
        raise note_refusal(misfit(error)) from error


async def _failing(refusal: RequestRefused) -> Any:
    """An async generator, as `generate_request` returns one, that raises the refusal."""
    raise refusal
    yield


async def _tokenize_texts(original: Any, manager: Any, texts: Any, *args: Any, **options: Any) -> Any:
    """Refuse what no tokenizer takes, and encode long texts in a thread.

    The tokenizer runs without Python's lock, so other requests are served meanwhile.
    """
    check_texts(texts)
    chars = sum(len(text) for text in ([texts] if isinstance(texts, str) else texts or ()))
    if chars <= LONG_TEXT or manager.async_dynamic_batch_tokenizer is not None:
        return await original(manager, texts, *args, **options)
    return await asyncio.to_thread(_run, original, manager, texts, *args, **options)


async def _run_large(original: Any, serving: Any, adapted: Any, request: Any, raw_request: Any) -> Any:
    """Run a handler that awaits nothing of this event loop in a thread, if its request is large."""
    length = raw_request.headers.get("content-length") if raw_request else None
    if length is not None and int(length) <= LONG_TEXT:
        return await original(serving, adapted, request, raw_request)
    return await asyncio.to_thread(_run, original, serving, adapted, request, raw_request)


def _run(function: Any, *args: Any, **options: Any) -> Any:
    return asyncio.run(function(*args, **options))
