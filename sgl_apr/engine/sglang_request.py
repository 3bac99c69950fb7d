"""What engines that send SGLang's `/generate` requests have in common, over HTTP or in this process."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from sgl_apr.engine.base import Load, Request, Result, TokenSink
from sgl_apr.engine.logprobs import CollectedLogprobs, new_entries
from sgl_apr.engine.step_timer import StepTimer
from sgl_apr.engine.unexpected_answer import unexpected
from sgl_apr.errors import EngineError
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.join_layout import LAYOUT_PARAM, Layout

MAX_COUNT = 1 << 62  # tokens or requests
# Models have a few more ids than their tokenizers, since the number is rounded up.
PADDED_IDS = 4096
UNKNOWN_VOCAB_SIZE = 1 << 24
STREAM_INTERVAL = 32  # tokens of a chunk that nobody waits for
INTERVAL_PARAM = (
    "stream_interval"  # a sampling parameter: tokens of a chunk, after the first chunk of one token
)
# The share of the timeout that such a chunk may take, and the seconds of a decoding step before one is measured.
CHUNK_SHARE, UNKNOWN_STEP_S = 0.25, 0.25
RESUME_PARAM = "apr_resumed_tokens"  # a custom parameter: `Request.resumed_tokens`
# What SGLang reports for each rank: the fields that `sum_loads` uses.
LOAD_FIELDS = (
    "num_running_reqs",
    "num_waiting_reqs",
    "num_used_tokens",
    "max_total_num_tokens",
    "max_running_requests",
)


class SGLangEngine(ABC):
    """Decodes, commits and forks with `_generate`. A fork needs no state here: the server caches its prefix.

    Attributes:
        default_interval: Tokens of a chunk unless a request sets another number. None if a request cannot.
        tool_call_parser: How the model writes calls of tools: the server's `--tool-call-parser`.
    """

    caches_output = True
    _tokenizer: Tokenizer
    _timeout: float
    _step_timer: StepTimer
    default_interval: int | None = None
    tool_call_parser: str | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    async def decode(self, request: Request, on_tokens: TokenSink | None = None) -> Result:
        sampling = decode_sampling_params(request)
        interval = self._quiet_interval() if on_tokens is None else None
        if interval is None or INTERVAL_PARAM in sampling:
            return await self._generate(request, sampling, on_tokens)
        try:
            return await self._generate(request, {**sampling, INTERVAL_PARAM: interval}, None)
        except EngineError as error:
            if error.status != 400 or INTERVAL_PARAM not in str(error):
                raise
            self.default_interval = None  # an SGLang without the parameter
        # The request that was refused is being aborted by its id, so this one has another one of the same length.
        rid = request.rid[:-1] + ("1" if request.rid.endswith("0") else "0")
        return await self._generate(replace(request, rid=rid), sampling, None)

    def _quiet_interval(self) -> int | None:
        """Tokens of a chunk that nobody waits for. None leaves it to the server.

        Fewer and larger chunks save most of the time that client and server take for a token. None may take so long
        that the client gives the server up.
        """
        if self.default_interval is None or self.default_interval >= STREAM_INTERVAL:
            return None
        step_s = max((seconds for _, seconds in self._step_timer.steps), default=UNKNOWN_STEP_S)
        tokens = int(min(STREAM_INTERVAL, CHUNK_SHARE * self._timeout / max(step_s, 1e-6)))
        return tokens if tokens > self.default_interval else None

    async def commit(self, request: Request) -> Result:
        return await self._generate(request, {"max_new_tokens": 0}, None)

    async def fork(self, request: Request, size: int) -> tuple[Result, Sequence[Self]]:
        return await self.commit(request), [self] * size

    async def release(self) -> None:  # noqa: B027  # complete, though empty
        """Nothing to free."""

    @abstractmethod
    async def _generate(
        self, request: Request, sampling: Mapping[str, Any], on_tokens: TokenSink | None
    ) -> Result:
        """Run a request with these sampling parameters and return its result."""


def decode_sampling_params(request: Request) -> dict[str, Any]:
    """Return the sampling parameters of a request that decodes, under SGLang's names."""
    sampling = {
        "skip_special_tokens": False,
        **request.sampling,
        "max_new_tokens": request.max_tokens,
        "stop_token_ids": list(request.stop_ids),
    }
    if request.grammar is not None:
        sampling["ebnf"] = request.grammar
        if request.resumed_tokens:
            custom = {**(sampling.get("custom_params") or {}), RESUME_PARAM: request.resumed_tokens}
            sampling["custom_params"] = custom
    elif request.stop:
        sampling["stop"] = list(request.stop)
    return sampling


def with_layout(sampling: Mapping[str, Any], layout: Layout | None) -> dict[str, Any]:
    """Return sampling parameters that carry a layout to the server's cache."""
    if layout is None:
        return dict(sampling)
    custom = {**(sampling.get("custom_params") or {}), LAYOUT_PARAM: json.dumps(layout)}
    return {**sampling, "custom_params": custom}


def make_result(
    name: str,
    ids: Sequence[int],
    logprobs: CollectedLogprobs,
    meta: Mapping[str, Any],
    request: Request,
) -> Result:
    """Return the result of a request.

    Args:
        name: The engine, for messages.
        ids: The ids of all chunks.
        logprobs: Those of all chunks.
        meta: `meta_info` of the last chunk.
        request: The request.

    Raises:
        EngineError: The engine reports no counts.
    """
    version = meta.get("weight_version")
    return Result(
        token_ids=tuple(ids),
        finish="length" if meta["finish_reason"]["type"] == "length" else "stop",
        prompt_tokens=_count(name, meta, "prompt_tokens"),
        cached_tokens=_count(name, meta, "cached_tokens"),
        logprobs=tuple(logprobs.values) if request.logprobs else None,
        top_logprobs=tuple(logprobs.top) if request.top_logprobs else None,
        weight_version=None if version is None else str(version),
    )


def check_chunk(name: str, data: Any) -> dict[str, Any]:
    """Return the `meta_info` of a chunk, after a check that the chunk is one of SGLang's.

    Args:
        name: The engine, for messages.
        data: The chunk.

    Raises:
        EngineError: It is something else, or reports an error.
    """
    if not isinstance(data, dict):
        raise unexpected(name, "a chunk", type(data).__name__, "an object")
    if "error" in data:
        error = data["error"] if isinstance(data["error"], dict) else {"message": data["error"]}
        status = error.get("code")
        message = " ".join(str(error.get("message", error)).split())[:300]
        raise EngineError(
            f"the server answered {status if type(status) is int else 500}: {message}",
            status if type(status) is int else None,
        )
    meta = data.get("meta_info")
    if not isinstance(meta, dict):
        raise unexpected(name, "meta_info", type(meta).__name__, "an object")
    reason = meta.get("finish_reason")
    if reason is not None and not (isinstance(reason, dict) and isinstance(reason.get("type"), str)):
        raise unexpected(name, "finish_reason", repr(reason)[:60], "null, or an object with a type")
    if reason and reason["type"] == "abort":  # may have no counts
        meta.setdefault("completion_tokens", 0)
    _count(name, meta, "completion_tokens")
    return meta


def _count(name: str, meta: Mapping[str, Any], field: str) -> int:
    value = meta.get(field)
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise unexpected(name, field, repr(value)[:60], "a number of tokens")
    return value


def id_limit(tokenizer: Tokenizer, vocab_size: int | None = None) -> int:
    """Return the number of token ids that a model can have, from its own size or that of its tokenizer."""
    tokens = getattr(tokenizer, "vocab_size", None)
    return vocab_size or (tokens + PADDED_IDS if isinstance(tokens, int) else UNKNOWN_VOCAB_SIZE)


def check_finished(name: str, meta: Mapping[str, Any]) -> None:
    """Check that a request has ended by itself.

    Args:
        name: The engine, for the message.
        meta: `meta_info` of the last chunk.

    Raises:
        EngineError: The output ended early, or the engine aborted the request.
    """
    reason = meta.get("finish_reason")
    if not isinstance(reason, dict):
        raise EngineError(f"{name} ended its answer without a finish reason: it died or is stopping")
    if reason["type"] == "abort":
        raise EngineError(f"{name} aborted the request: {reason.get('message')}", reason.get("status_code"))


def stream_interval(value: Any) -> int | None:
    """Return `SGLangEngine.default_interval` from the setting of a server, None if that is no number of tokens."""
    return value if type(value) is int and value >= 1 else None


def sum_loads(
    ranks: Sequence[Mapping[str, Any]], steps: tuple[tuple[float, float], ...], name: str = "the engine"
) -> Load:
    """Return the load of an engine from SGLang's report for each of its ranks.

    Args:
        ranks: The reports.
        steps: `Load.steps`.
        name: The engine, for messages.

    Raises:
        EngineError: A report lacks a number.
    """

    def total(field: str) -> int:
        return sum(_count(name, rank, field) for rank in ranks)

    if not all(isinstance(rank, Mapping) for rank in ranks):
        raise unexpected(name, "loads", "a list of something else", "a list of objects")
    has_maximum = any("max_running_requests" in rank for rank in ranks)
    return Load(
        running=total("num_running_reqs"),
        waiting=total("num_waiting_reqs"),
        used_tokens=total("num_used_tokens"),
        max_tokens=total("max_total_num_tokens"),
        max_running_requests=(total("max_running_requests") if has_maximum else 0) or None,
        steps=steps,
    )


def new_token_ids(name: str, data: Mapping[str, Any], known: int, vocab_size: int) -> list[int]:
    """Return the ids that are new in a chunk.

    SGLang sends all ids so far, or with incremental streaming only the new ones. A chunk that waited while others of its
    batch were sent may have more ids than it counts, since SGLang refers to a list that still grows.

    Args:
        name: The engine, for messages.
        data: The chunk, after `check_chunk`.
        known: How many ids earlier chunks had.
        vocab_size: The number of ids that the model has.

    Raises:
        EngineError: An id is none of the model's.
    """
    ids, reason = data.get("output_ids"), data["meta_info"].get("finish_reason")
    if ids is None and reason and reason["type"] == "abort":  # before its first token
        return []
    if not isinstance(ids, list):
        raise unexpected(name, "output_ids", type(ids).__name__, "a list of token ids")
    new = new_entries(ids, known, data["meta_info"])
    if new and (set(map(type, new)) != {int} or min(new) < 0 or max(new) >= vocab_size):
        wrong = next(i for i in new if type(i) is not int or not 0 <= i < vocab_size)
        raise unexpected(
            name, "a token id", repr(wrong)[:60], f"one of the vocabulary, 0 to {vocab_size - 1}"
        )
    return new
