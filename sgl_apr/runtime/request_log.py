"""What the engine did during a trajectory, and where limits, pacing and joins acted."""

from __future__ import annotations

import time

from sgl_apr.engine.base import Load, Result
from sgl_apr.runtime.events import RequestFinished, ToolReturned
from sgl_apr.runtime.span_graph import EventEmitter
from sgl_apr.trajectory.calls import Call, JoinRecord, LimitHit, PacingDecision
from sgl_apr.trajectory.spans import Path
from sgl_apr.trajectory.tool_calls import ToolCall
from sgl_apr.trajectory.worker_groups import GroupRecord


class RequestLog:
    """Records requests and decisions in the order in which they happen."""

    def __init__(self, events: EventEmitter) -> None:
        self._events, self._started = events, time.monotonic()
        self.calls: list[Call] = []
        self.limits: dict[LimitHit, None] = {}
        self.decisions: list[PacingDecision] = []
        self.joins: list[JoinRecord] = []
        self.tool_calls: list[ToolCall] = []
        self.groups: list[GroupRecord] = []

    @property
    def seconds(self) -> float:
        """Seconds since the trajectory began."""
        return time.monotonic() - self._started

    def record_tool_call(self, call: ToolCall) -> None:
        """Record a call of a tool that has ended."""
        self.tool_calls.append(call)
        self._events.emit(ToolReturned(len(self.tool_calls) - 1, call))

    def record_request(
        self,
        phase: str,
        path: Path,
        result: Result,
        new: int,
        started: float,
        seed: int | None,
        retries: int,
        continuations: int = 0,
    ) -> int:
        """Record a request that has ended.

        Args:
            phase: What the request was for.
            path: The sequence that sent it.
            result: What the engine returned.
            new: Prompt tokens that no earlier request had computed.
            started: When it was sent, on the monotonic clock.
            seed: The seed of its sampling.
            retries: How often it was repeated.
            continuations: How many further requests continued it.

        Returns:
            The index of the call.
        """
        call = Call(
            phase=phase,
            path=path,
            prompt_tokens=result.prompt_tokens,
            cached_tokens=result.cached_tokens,
            new_tokens=new,
            output_tokens=len(result.token_ids),
            started=started - self._started,
            ended=time.monotonic() - self._started,
            seed=seed,
            retries=retries,
            continuations=continuations,
            logprobs=result.logprobs,
            top_logprobs=result.top_logprobs,
            weight_version=result.weight_version,
        )
        self.calls.append(call)
        if self._events.listening:
            self._events.emit(RequestFinished(len(self.calls) - 1, call))
        return len(self.calls) - 1

    def record_limit(self, limit: str, path: Path) -> None:
        """Record that a limit acted on the sequence at `path`. A limit counts once for each sequence."""
        self.limits[LimitHit(limit, path)] = None

    def record_join(self, path: Path, why_text: str) -> None:
        """Record how a block was joined: in the KV cache, or as text for the reason `why_text`."""
        self.joins.append(JoinRecord(path, "text" if why_text else "kv", why_text))

    def record_group(self, group: GroupRecord) -> None:
        """Record that the branches of a block decode as a group of workers."""
        self.groups.append(group)

    def record_pacing(self, block: Path, branches: int, parallelism: int, load: Load, reason: str) -> None:
        """Record how many branches of a block run in parallel, and what was known of the engine."""
        step_s = load.step_s(load.running + parallelism)
        self.decisions.append(
            PacingDecision(
                block, branches, parallelism, load.running, load.waiting, load.free_tokens, step_s, reason
            )
        )
