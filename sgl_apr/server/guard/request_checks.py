"""Checks the values of a request to the engine, whatever route it came by.

SGLang checks most values itself. These are the ones that it does not, and that end its scheduler, occupy it for
seconds, or are answered with status 500.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.runtime.value_checks import SAMPLING_TYPES, check_sampling, check_type, check_types, shorten
from sgl_apr.server.guard.grammar_checks import check_grammar_size, check_schema
from sgl_apr.server.guard.json_checks import (
    GRAMMAR_FIELDS,
    check_sampling_fields,
    check_session_allowed,
    check_token_ids,
    json_bytes,
)
from sgl_apr.server.guard.limits import GuardLimits
from sgl_apr.server.guard.model_size import ModelSize
from sgl_apr.server.guard.refusal import RequestRefused, over_limit

MAX_INT32 = 2**31 - 1
# Whole numbers by field: the lowest and the highest value.
SAMPLING_INTS: Mapping[str, tuple[int, int]] = {
    "max_new_tokens": (0, MAX_INT32), "min_new_tokens": (0, MAX_INT32), "n": (1, MAX_INT32),
    "beam_width": (1, MAX_INT32), "stream_interval": (1, MAX_INT32), "sampling_seed": (-(2**63), 2**63 - 1),
}  # fmt: skip
SAMPLING_FLAGS = ("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim")
REQUEST_INTS: Mapping[str, tuple[int, int]] = {
    "logprob_start_len": (-1, MAX_INT32), "priority": (-MAX_INT32, MAX_INT32), "routed_experts_start_len": (0, MAX_INT32),
    "bootstrap_port": (0, 65535), "bootstrap_room": (0, 2**63 - 1), "decode_tp_size": (1, MAX_INT32),
    "disagg_prefill_dp_rank": (0, MAX_INT32), "max_thinking_tokens": (0, MAX_INT32),
}  # fmt: skip
MAX_STOP_CHARS = 4096
MAX_GRAMMARS = 8  # different ones in one request
# Fields of a request that each sequence has its own part of, or that have limits of their own.
UNSHARED_FIELDS = ("text", "sampling_params", "image_data", "video_data", "audio_data")
SESSION_TYPES: Mapping[str, type] = {
    "id": str, "rid": str, "offset": int, "replace": bool, "drop_previous_output": bool,
}  # fmt: skip
SERVER_FIELDS = (
    "lora_id",
    "positional_embed_overrides",
    "http_worker_ipc",
)  # no request of a client has them
JSON_TYPES = (str, int, float, dict)


def check_batch(request: Any, limits: GuardLimits) -> None:
    """Check how many sequences a request asks for, before SGLang makes a request of each.

    Args:
        request: SGLang's `GenerateReqInput` or `EmbeddingReqInput`, before it is normalized.
        limits: The operator's limits.

    Raises:
        RequestRefused: It asks for too many, or its fields do not fit their number.
    """
    prompts = _batch_size(request)
    sampling = getattr(request, "sampling_params", None)
    objects = sampling if isinstance(sampling, list) else [sampling]
    if isinstance(sampling, list) and len(sampling) != (prompts or -1):
        raise RequestRefused(
            f"sampling_params has {len(sampling)} entries, expected an object, or one for each prompt of a list",
            "sampling_params",
        )
    copies = 1
    for values in (values for values in objects if isinstance(values, dict)):
        check_sampling_fields(values, limits)
        for name in ("n", "beam_width"):
            if values.get(name) is not None:
                copies = max(copies, _check_int(name, values[name], 1, MAX_INT32))
    if (total := (prompts or 1) * copies) > limits.prompts:
        found = f"{prompts or 1} x n={copies}" if copies > 1 else total
        raise over_limit("the number of prompts", found, "--apr-max-prompts", limits.prompts, "n")
    if total > 1:
        _check_batch_bytes(request, objects, total, limits)
    _check_grammar_count(objects)
    if isinstance(request.rid, list) and prompts is None and copies == 1:
        raise RequestRefused(f"rid={shorten(request.rid)}, expected a string for one prompt", "rid")
    if isinstance(request.rid, str) and prompts is not None and not hasattr(request, "return_logprob"):
        # SGLang makes the ids of a batch from one id for completions only.
        raise RequestRefused(
            f"rid={shorten(request.rid)}, expected a list with an id for each of {prompts} prompts", "rid"
        )
    for name in SERVER_FIELDS:
        value = getattr(request, name, None)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, JSON_TYPES):
                raise RequestRefused(f"{name} is set by the server, expected a request without it", name)
    _check_session(getattr(request, "session_params", None), limits)


def check_texts(texts: Any) -> None:
    """Check what SGLang gives to its tokenizer: a text, a list of texts, or a list of pairs of texts.

    Raises:
        RequestRefused: It is something else.
    """
    for entry in texts if isinstance(texts, list) else ():
        is_pair = isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
        if not (isinstance(entry, str) or is_pair):
            raise RequestRefused(
                f"text has the entry {shorten(entry)}, expected a string, or a pair of strings for a cross-encoder",
                "text",
            )


def check_request(
    request: Any, input_ids: Sequence[int] | None, limits: GuardLimits, size: ModelSize
) -> None:
    """Check one request with one prompt, just before it is sent to the scheduler.

    Args:
        request: SGLang's `GenerateReqInput` or `EmbeddingReqInput`.
        input_ids: The token ids of its prompt.
        limits: The operator's limits.
        size: The size of the model.

    Raises:
        RequestRefused: A value is not possible or above a limit.
    """
    if input_ids is not None and not request.contains_mm_input():
        _check_prompt(request, input_ids, size)
    sampling = request.sampling_params
    if isinstance(sampling, dict) and sampling:
        _check_sampling(sampling, limits, size)
    if hasattr(request, "return_logprob"):
        _check_generate(request, input_ids, limits, size)


def _batch_size(request: Any) -> int | None:
    """Return how many prompts a request has, None if it is not a list of prompts."""
    for values in (request.text, request.input_ids):
        if values is not None:
            return (
                len(values)
                if isinstance(values, list) and values and isinstance(values[0], str | list)
                else None
            )
    embeds = request.input_embeds
    if embeds is None:
        return None
    if not (isinstance(embeds, list) and embeds and isinstance(embeds[0], list) and embeds[0]):
        raise RequestRefused(f"input_embeds={shorten(embeds)}, expected a list of vectors", "input_embeds")
    return len(embeds) if isinstance(embeds[0][0], list) else None


def _check_batch_bytes(request: Any, sampling: Sequence[Any], total: int, limits: GuardLimits) -> None:
    """Check what SGLang sends to its scheduler in addition to the prompts: it copies it for each sequence."""
    shared = [
        value
        for name, value in vars(request).items()
        if isinstance(value, str | dict) and name not in UNSHARED_FIELDS
    ]
    per_object = total // len(sampling) or 1
    size = sum(map(json_bytes, sampling)) * per_object + sum(map(json_bytes, shared)) * total
    if size > limits.batch_bytes:
        raise over_limit(
            f"the number of bytes of the sampling parameters of {total} sequences", size, "--apr-max-batch-bytes",
            limits.batch_bytes, "sampling_params",
        )  # fmt: skip


def _check_grammar_count(sampling: Sequence[Any]) -> None:
    """Refuse many grammars in one request, because each is compiled."""
    grammars = {
        (name, value)
        for values in sampling
        if isinstance(values, dict)
        for name in GRAMMAR_FIELDS
        if isinstance(value := values.get(name), str)
    }
    if len(grammars) > MAX_GRAMMARS:
        raise RequestRefused(
            f"sampling_params has {len(grammars)} different grammars, expected at most {MAX_GRAMMARS} in one request",
            "sampling_params",
        )


def _check_session(session: Any, limits: GuardLimits) -> None:
    if session is None:
        return
    check_session_allowed("session_params", limits)
    if not isinstance(session, dict):
        raise RequestRefused(f"session_params={shorten(session)}, expected an object", "session_params")
    try:
        check_types(session, SESSION_TYPES, "session_params.")
    except AprError as error:
        raise RequestRefused(str(error), "session_params") from None


def _check_prompt(request: Any, input_ids: Sequence[int], size: ModelSize) -> None:
    session = getattr(request, "session_params", None)
    continues = isinstance(session, dict) and session.get("id")
    if not len(input_ids) and not continues and request.input_embeds is None:
        raise RequestRefused("the prompt has no tokens, expected at least one", "prompt")
    check_token_ids("input_ids", input_ids, size.vocab_size)


def _check_sampling(sampling: Mapping[str, Any], limits: GuardLimits, size: ModelSize) -> None:
    check_sampling_fields(sampling, limits)
    try:
        known = {name: value for name, value in sampling.items() if name in SAMPLING_TYPES}
        check_sampling(known, size.vocab_size)
        for name in SAMPLING_FLAGS:
            if (value := sampling.get(name)) is not None and value not in (0, 1):
                check_type(name, value, bool)
        for name in GRAMMAR_FIELDS:
            if (value := sampling.get(name)) is not None:
                check_type(name, value, str)
    except AprError as error:
        raise RequestRefused(str(error), str(error).partition("=")[0].partition(" ")[0]) from None
    for name, (lowest, highest) in SAMPLING_INTS.items():
        if sampling.get(name) is not None:
            _check_int(name, sampling[name], lowest, highest)
    for name in ("json_schema", "structural_tag"):
        check_schema(sampling.get(name), name)
    for name in ("ebnf", "structural_tag"):
        check_grammar_size(sampling.get(name), limits, name)
    _check_stops(sampling, size)


def _check_stops(sampling: Mapping[str, Any], size: ModelSize) -> None:
    stop = sampling.get("stop")
    for text in stop if isinstance(stop, list) else [stop]:
        if text is not None and not (isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARS):
            raise RequestRefused(
                f"stop has {shorten(text)}, expected strings of 1 to {MAX_STOP_CHARS} characters", "stop"
            )
    ids = sampling.get("stop_token_ids")
    if ids is not None:
        if not isinstance(ids, list):
            raise RequestRefused(
                f"stop_token_ids={shorten(ids)}, expected a list of token ids", "stop_token_ids"
            )
        check_token_ids("stop_token_ids", [i for i in ids if i is not None], size.vocab_size)


def _check_generate(
    request: Any, input_ids: Sequence[int] | None, limits: GuardLimits, size: ModelSize
) -> None:
    for name, (lowest, highest) in REQUEST_INTS.items():
        value = getattr(request, name, None)
        if value is not None:
            _check_int(name, value, lowest, highest)
    top = request.top_logprobs_num
    if top and _check_int("top_logprobs", top, 0, MAX_INT32) > (
        limit := min(limits.top_logprobs, size.vocab_size)
    ):
        raise over_limit("top_logprobs", top, "--apr-max-top-logprobs", limit, "top_logprobs")
    ids = request.token_ids_logprob
    if ids:
        if not isinstance(ids, list):
            raise RequestRefused(
                f"token_ids_logprob={shorten(ids)}, expected a list of token ids", "token_ids_logprob"
            )
        if len(ids) > limits.top_logprobs:
            raise over_limit("the length of token_ids_logprob", len(ids), "--apr-max-top-logprobs", limits.top_logprobs, "token_ids_logprob")  # fmt: skip
        check_token_ids("token_ids_logprob", ids, size.vocab_size)
    start = request.logprob_start_len
    if request.return_logprob and input_ids is not None and start is not None and start >= 0:
        _check_prompt_logprobs(
            request, max(0, len(input_ids) - start) * ((top or 0) + len(ids or ())), limits
        )
    if start is not None and input_ids is not None and start > len(input_ids):
        raise RequestRefused(
            f"logprob_start_len is {start}, expected at most {len(input_ids)}, the tokens of the prompt", "logprob_start_len"
        )  # fmt: skip


def _check_prompt_logprobs(request: Any, values: int, limits: GuardLimits) -> None:
    """Check how many log-probabilities of the prompt a response has: all of them are made text at once."""
    sampling = request.sampling_params
    copies = sampling.get("n") if isinstance(sampling, dict) else None
    values *= copies or 1
    if values > limits.prompt_logprobs:
        raise over_limit(
            "the number of log-probabilities of the prompt", values, "--apr-max-prompt-logprobs",
            limits.prompt_logprobs, "logprob_start_len",
        )  # fmt: skip


def _check_int(name: str, value: Any, lowest: int, highest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise RequestRefused(
            f"{name} is {shorten(value)}, expected a whole number from {lowest} to {highest}", name
        )
    return value
