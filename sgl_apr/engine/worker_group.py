"""Groups of workers in SGLang's form: one `/generate` request with a prompt for each worker, and the chunks that answer it."""

from __future__ import annotations

import contextlib
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any

from sgl_apr.engine.base import GroupRequest, Request, Result, TokenSink, WorkerSink
from sgl_apr.engine.logprobs import CollectedLogprobs, logprob_fields
from sgl_apr.engine.sglang_names import GROUP_PARAM, RADIX_CACHE_BACKEND
from sgl_apr.engine.sglang_request import (
    INTERVAL_PARAM,
    SGLangEngine,
    check_chunk,
    check_finished,
    decode_sampling_params,
    make_result,
    new_token_ids,
)
from sgl_apr.engine.step_timer import StepTimer
from sgl_apr.engine.unexpected_answer import unexpected
from sgl_apr.errors import EngineError, UnsupportedEngine
from sgl_apr.trajectory.worker_groups import GroupKind

# Attention backends that decode Hogwild!, whose queries are turned for each block. Group Think needs none of its own.
HOGWILD_BACKENDS = ("apr_cpu", "flashinfer")


def group_kinds(server: Mapping[str, Any]) -> frozenset[GroupKind]:
    """Return the kinds of groups that a server decodes, by the settings that it reports.

    A server with the cache of this package has the groups, too. The model is not checked here: a server whose model does
    not work with groups refuses them with the reason.

    Args:
        server: SGLang's arguments by name, with those that SGLang resolved.

    Examples:
        >>> sorted(group_kinds({"radix_cache_backend": "apr", "page_size": 1, "attention_backend": "triton"}))
        ['group_think']
        >>> sorted(group_kinds({"radix_cache_backend": "apr", "page_size": 64, "attention_backend": "triton"}))
        []
    """
    obstacles = (
        "enable_mixed_chunk",
        "enable_dp_attention",
        "speculative_algorithm",
        "enable_two_batch_overlap",
    )
    if (
        server.get("radix_cache_backend") != RADIX_CACHE_BACKEND
        or server.get("page_size") != 1
        or (server.get("pp_size") or 1) > 1
        or any(server.get(name) for name in obstacles)
    ):
        return frozenset()
    decode_backend = server.get("decode_attention_backend") or server.get("attention_backend")
    return frozenset(("group_think", "hogwild") if decode_backend in HOGWILD_BACKENDS else ("group_think",))


GROUP_SETTINGS = (
    "radix_cache_backend", "page_size", "pp_size", "enable_mixed_chunk", "enable_dp_attention", "speculative_algorithm",
    "enable_two_batch_overlap", "attention_backend", "decode_attention_backend",
)  # fmt: skip  # what `group_kinds` reads


def group_body(group: GroupRequest, sampling: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the `/generate` request of a group.

    Args:
        group: The group.
        sampling: The sampling parameters of each worker.
    """
    first = group.requests[0]
    return {
        **first.fields,
        "rid": [request.rid for request in group.requests],
        "input_ids": [list(request.input_ids) for request in group.requests],
        "sampling_params": [_with_group(group, number, own) for number, own in enumerate(sampling)],
        **logprob_fields(first),
    }


def _with_group(group: GroupRequest, number: int, sampling: Mapping[str, Any]) -> dict[str, Any]:
    worker: dict[str, Any] = {
        "kind": group.kind,
        "worker": number,
        "workers": len(group.requests),
        "prompt_tokens": group.prompt_tokens,
    }
    if group.kind == "group_think":
        worker["position_range"] = group.position_range
    else:
        worker["step_end"] = group.step_end
    return {**sampling, "custom_params": {**(sampling.get("custom_params") or {}), GROUP_PARAM: worker}}


class WorkerGroupEngine(SGLangEngine):
    """An engine of SGLang whose server may decode groups of workers.

    Attributes:
        groups: The kinds of groups that it decodes.
    """

    groups: Collection[GroupKind] = frozenset()

    async def group(
        self,
        group: GroupRequest,
        on_tokens: Sequence[TokenSink | None] | None = None,
        on_end: WorkerSink | None = None,
    ) -> Sequence[Result | EngineError]:
        """Decode the workers of a group together, as `Engine.group` says."""
        if group.kind not in self.groups:
            raise UnsupportedEngine(
                f"the engine does not decode groups of kind {group.kind}, expected a server that `sgl-apr serve` started "
                "in a mode where groups work (docs/limits.md), and no router"
            )
        sampling = [decode_sampling_params(request) for request in group.requests]
        if not any(on_tokens or ()) and (interval := self._quiet_interval()):
            sampling = [{INTERVAL_PARAM: interval, **own} for own in sampling]
        name, vocab_size = self._response_limits()
        collector = GroupCollector(name, group, vocab_size, self._step_timer, on_tokens, on_end)
        try:
            async with contextlib.aclosing(self._group_chunks(group_body(group, sampling))) as chunks:
                async for data in chunks:
                    collector.add(data)
        except EngineError as error:
            return collector.finish(error)
        return collector.finish()

    @abstractmethod
    def _group_chunks(self, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Send a `/generate` request with several prompts and yield its chunks. Closing it early aborts the request."""

    @abstractmethod
    def _response_limits(self) -> tuple[str, int]:
        """Return how errors name the engine, and the number of ids that its model has."""


class GroupCollector:
    """Collects the chunks of a group, each of which belongs to one worker.

    Args:
        name: The engine, for messages.
        group: The group.
        vocab_size: The number of ids that the model has.
        step_timer: Measures the steps.
        on_tokens: For each worker what receives its ids.
        on_end: Receives the end of each worker.
    """

    def __init__(
        self,
        name: str,
        group: GroupRequest,
        vocab_size: int,
        step_timer: StepTimer,
        on_tokens: Sequence[TokenSink | None] | None,
        on_end: WorkerSink | None,
    ) -> None:
        self._name, self._vocab_size, self._timer, self._on_end = name, vocab_size, step_timer, on_end
        sinks = on_tokens or [None] * len(group.requests)
        self._workers = [_Worker(name, *pair) for pair in zip(group.requests, sinks, strict=True)]

    @property
    def results(self) -> list[Result | EngineError]:
        """The result or error of each worker, once all have ended."""
        return [worker.outcome for worker in self._workers if worker.outcome is not None]

    def add(self, data: Any) -> None:
        """Add a chunk.

        Raises:
            EngineError: It is none of a worker's.
        """
        meta = check_chunk(self._name, data)
        index = data.get("index")
        if type(index) is not int or not 0 <= index < len(self._workers):
            raise unexpected(
                self._name, "index", repr(index)[:60], f"a worker, 0 to {len(self._workers) - 1}"
            )
        worker = self._workers[index]
        if worker.outcome is not None:
            raise unexpected(self._name, "index", str(index), "a worker that has not ended")
        new = new_token_ids(self._name, data, len(worker.received), self._vocab_size)
        worker.add(new, meta, self._timer)
        if meta.get("finish_reason") is not None:
            try:
                check_finished(self._name, meta)
                outcome: Result | EngineError = worker.result(meta)
            except EngineError as error:
                outcome = error
            self._end(index, outcome)

    def finish(self, error: EngineError | None = None) -> list[Result | EngineError]:
        """Return the result or error of each worker, after the last chunk.

        Args:
            error: What ended the response early. Workers that have not ended get it.

        Raises:
            EngineError: The response ended early, and no worker has ended by itself.
        """
        running = [k for k, worker in enumerate(self._workers) if worker.outcome is None]
        if running and error is None:
            error = EngineError(
                f"{self._name} ended its answer without a finish reason: it died or is stopping"
            )
        if error is not None:
            if len(running) == len(self._workers):
                raise error
            for index in running:
                self._end(index, error)
        return self.results

    def _end(self, index: int, outcome: Result | EngineError) -> None:
        self._workers[index].outcome = outcome
        if self._on_end:
            self._on_end(index, outcome)


class _Worker:
    """What has arrived of one worker."""

    def __init__(self, name: str, request: Request, sink: TokenSink | None) -> None:
        self.received: list[int] = []
        self.outcome: Result | EngineError | None = None
        self._name, self._request, self._sink = name, request, sink
        self._logprobs, self._at = CollectedLogprobs(name), 0.0

    def add(self, new: Sequence[int], meta: Mapping[str, Any], timer: StepTimer) -> None:
        self._logprobs.add(meta)
        if not new:
            return
        now = time.monotonic()
        if self.received:
            timer.record_step(len(new), now - self._at)
        self._at = now
        self.received += new
        if self._sink:
            self._sink(new)

    def result(self, meta: Mapping[str, Any]) -> Result:
        return make_result(self._name, self.received, self._logprobs, meta, self._request)
