"""What engines that send SGLang's `/generate` requests have in common, over HTTP or in this process."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

from sgl_apr.engine.base import Load, Request, Result, TokenSink
from sgl_apr.errors import EngineError
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.join_layout import LAYOUT_PARAM, Layout

# What SGLang reports for each rank: the fields that `sum_loads` uses.
LOAD_FIELDS = (
    "num_running_reqs",
    "num_waiting_reqs",
    "num_used_tokens",
    "max_total_num_tokens",
    "max_running_requests",
)


class SGLangEngine(ABC):
    """Decodes, commits and forks with `_generate`. A fork needs no state here: the server caches its prefix."""

    _tokenizer: Tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    async def decode(self, request: Request, on_tokens: TokenSink | None = None) -> Result:
        return await self._generate(request, decode_sampling_params(request), on_tokens)

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
    ids: Sequence[int], logprobs: Sequence[float], meta: Mapping[str, Any], request: Request
) -> Result:
    """Return the result of a request.

    Args:
        ids: The ids of all chunks.
        logprobs: The log-probabilities of all chunks.
        meta: `meta_info` of the last chunk.
        request: The request.
    """
    version = meta.get("weight_version")
    return Result(
        token_ids=tuple(ids),
        finish="length" if meta["finish_reason"]["type"] == "length" else "stop",
        prompt_tokens=int(meta["prompt_tokens"]),
        cached_tokens=int(meta["cached_tokens"]),
        logprobs=tuple(logprobs) if request.logprobs else None,
        weight_version=None if version is None else str(version),
    )


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


def sum_loads(ranks: Sequence[Mapping[str, Any]], steps: tuple[tuple[float, float], ...]) -> Load:
    """Return the load of an engine from SGLang's report for each of its ranks.

    Args:
        ranks: The reports.
        steps: `Load.steps`.
    """
    return Load(
        running=sum(rank["num_running_reqs"] for rank in ranks),
        waiting=sum(rank["num_waiting_reqs"] for rank in ranks),
        used_tokens=sum(rank["num_used_tokens"] for rank in ranks),
        max_tokens=sum(rank["max_total_num_tokens"] for rank in ranks),
        max_running_requests=sum(rank.get("max_running_requests", 0) for rank in ranks) or None,
        steps=steps,
    )


def new_logprobs(known: int, meta: Mapping[str, Any]) -> list[float]:
    """Return the log-probabilities that are new in a chunk, empty if none were requested.

    Args:
        known: How many log-probabilities earlier chunks had.
        meta: `meta_info` of the chunk.
    """
    logprobs: list[Any] = meta.get("output_token_logprobs") or []
    new = logprobs[known:] if len(logprobs) == int(meta["completion_tokens"]) else logprobs
    return [float(entry[0]) for entry in new]


def new_token_ids(output_ids: list[int], known: int, meta: Mapping[str, Any]) -> list[int]:
    """Return the ids that are new in a chunk.

    SGLang sends all ids so far, or with incremental streaming only the new ones.

    Args:
        output_ids: The ids of the chunk.
        known: How many ids earlier chunks had.
        meta: `meta_info` of the chunk.
    """
    total = int(meta["completion_tokens"])
    return output_ids[known:] if len(output_ids) == total else output_ids
