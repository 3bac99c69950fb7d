"""Runs the calls of tools of one sequence, and writes their results into it, while other sequences continue."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError, BranchFailed
from sgl_apr.formats.tool_syntax import DecodedCall, ToolSyntax
from sgl_apr.runtime.activity import Activity
from sgl_apr.runtime.branch_group import gather
from sgl_apr.runtime.cancel_scope import ScopeCancelled
from sgl_apr.runtime.events import ToolCalled
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.runtime.tools.execution import call_client, call_function
from sgl_apr.runtime.tools.observations import (
    PLAIN_FORM,
    ObservationForm,
    encode_form,
    observation_form,
)
from sgl_apr.runtime.tools.request import ToolRequest
from sgl_apr.runtime.tools.results import EncodedResult, ToolResult, encode_result, error_result
from sgl_apr.runtime.tools.rules import max_phase_calls
from sgl_apr.runtime.tools.tool import Tool
from sgl_apr.trajectory.tool_calls import ToolCall, ToolOutcome

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _PendingCall:
    """A call until it has ended."""

    id: str
    call: DecodedCall
    started: float
    result: EncodedResult | None = None


class ToolRunner:
    """Runs the tools of one trajectory. A call that fails becomes a result that says so.

    Args:
        options: Of the trajectory.
        syntax: Of its tools.
        recorder: Records calls and limits.
        activity: Counts what is in flight.
    """

    def __init__(
        self,
        options: ReasonOptions,
        syntax: ToolSyntax,
        recorder: TrajectoryRecorder,
        activity: Activity | None = None,
    ) -> None:
        self.options, self.budget, self.syntax = options, options.budget, syntax
        self.events, self.request_log = recorder.events, recorder.request_log
        self._tools = {tool.name: tool for tool in options.tools}
        self._max_calls = max_phase_calls(options, syntax)
        self._activity = activity
        self._form: ObservationForm | None = None

    @staticmethod
    def call_ids(sequence: SequenceState, count: int) -> tuple[str, ...]:
        """The ids of the next calls of a sequence, which are also the label of their span."""
        place = "".join((".".join(map(str, sequence.path)), "_" if sequence.path else ""))
        first = sequence.tool_calls + 1
        return tuple(f"call_{place}{k}" for k in range(first, first + count))

    async def run_calls(
        self,
        engine: Engine,
        sequence: SequenceState,
        calls: Sequence[DecodedCall],
        *,
        max_tokens: int | None = None,
        limiting_field: str | None = None,
    ) -> int:
        """Run the calls that a sequence ends with, all at once, and append their results to it.

        Where there is no room for results, the tools are not run, and the calls are dropped from the context.

        Args:
            engine: Renders the chat template.
            sequence: Its last span has the calls.
            calls: The calls.
            max_tokens: Tokens that the results may have together, with their form. None for what the sequence may write.
            limiting_field: The limit that `max_tokens` comes from.

        Returns:
            The number of new tokens, 0 if the calls were dropped.

        Raises:
            BranchFailed: A tool failed, and the options say that this ends the trajectory.
        """
        started = self.request_log.seconds
        ids = self.call_ids(sequence, len(calls))
        sequence.tool_calls += len(calls)
        pending = [_PendingCall(i, call, started) for i, call in zip(ids, calls, strict=True)]
        form = await self._observation_form(engine, sequence)
        limit = limiting_field or sequence.allowance.limiting_field
        tokens = self._result_tokens(sequence, form, len(calls), max_tokens)
        if tokens is None:
            self.request_log.record_limit(limit, sequence.path)
            self._drop(sequence, pending)
            return 0
        refusals = [self._refusal(sequence, call, index) for index, call in enumerate(calls)]

        async def run_one(one: _PendingCall, refusal: str | None) -> None:
            one.started = self.request_log.seconds
            result = error_result("refused", refusal) if refusal else await self._run(sequence, one)
            self._record(sequence, one, form, result, tokens, limit)

        try:
            await sequence.scope.run(
                gather(run_one(one, refusal) for one, refusal in zip(pending, refusals, strict=True))
            )
        except ScopeCancelled:
            for one in pending:
                if one.result is None:
                    result = error_result("cancelled", "the call was cancelled")
                    self._record(sequence, one, form, result, tokens, limit)
        return self._write(sequence, form, pending)

    def record_cut(self, sequence: SequenceState, text: str) -> None:
        """Record a call that was cut, and drop it from the context of its sequence.

        Args:
            sequence: Its last span has what was decoded of the call.
            text: What was decoded of it.
        """
        (call_id,) = self.call_ids(sequence, 1)
        sequence.tool_calls += 1
        outcome: ToolOutcome = "length" if sequence.scope.cancel_reason is None else "cancelled"
        now = self.request_log.seconds
        name = max((name for name in self._tools if name in text), key=len, default="")
        self.request_log.record_tool_call(ToolCall(call_id, sequence.path, name, text, "", outcome, now, now))
        sequence.drop_call()

    async def _observation_form(self, engine: Engine, sequence: SequenceState) -> ObservationForm:
        """What stands around results. The engine is asked once. A sequence that is cut meanwhile has the plain form."""
        if self._form is None:
            try:
                self._form = await sequence.scope.run(observation_form(engine, self.syntax))
            except ScopeCancelled:
                return PLAIN_FORM
        return self._form

    def _refusal(self, sequence: SequenceState, call: DecodedCall, index: int) -> str | None:
        """Why a call is not run; None if it is. A call that is known takes one of those that are left.

        `index` counts the calls that were made together. Without a mask, a model can make more than the options allow.
        """
        if index >= self._max_calls:
            return f"too many calls at once, expected at most {self._max_calls}"
        if call.name not in self._tools:
            return f"there is no tool {call.name[:80]!r}, expected one of {', '.join(self._tools)}"
        if sequence.allowance.tool_calls < 1:
            self.request_log.record_limit("tool_calls", sequence.path)
            return "no calls of tools are left"
        sequence.allowance.spend(tool_calls=1)
        return None

    def _result_tokens(
        self, sequence: SequenceState, form: ObservationForm, count: int, max_tokens: int | None
    ) -> int | None:
        """Tokens of each of so many results; None if there is no room for them.

        The sequence keeps its reserve of what it may write, for the text after them, if the rest is enough for results.
        """
        room = sequence.max_filler_tokens
        room = room if max_tokens is None else min(room, max_tokens)
        around = form.tokens(sequence.graph.tokenizer, count)
        for left in (int(room * (1 - self.budget.reserve)), room):
            if (tokens := (left - around) // count) >= 1:
                return min(tokens, self.budget.tool_result_tokens)
        return None

    async def _run(self, sequence: SequenceState, one: _PendingCall) -> ToolResult:
        """The result of a call that is not refused."""
        tool, call = self._tools[one.call.name], one.call
        try:
            arguments = tool.check_arguments(call.arguments) if tool.function else {}
        except AprError as error:
            return error_result("refused", str(error))
        self.events.emit(ToolCalled(sequence.path, one.id, call.name, call.arguments))
        if tool.function is None:
            return await self._ask_client(sequence, one)
        attempts = 2 if self.options.on_branch_failure == "retry" else 1
        result = ToolResult("error", "")
        for _ in range(attempts):
            with self._working():
                result = await self._attempt(tool, arguments)
            if result.outcome == "ok":
                return result
            log.info("call %s of tool %s: %s", one.id, call.name, result.text)
        if self.options.on_branch_failure == "raise":
            where = f"branch {sequence.identity}" if sequence.path else "the trunk"
            raise BranchFailed(f"{where}: tool {call.name}: {result.text}", sequence.path)
        return result

    async def _attempt(self, tool: Tool, arguments: dict[str, object]) -> ToolResult:
        assert tool.function is not None
        try:
            text = await call_function(tool.function, arguments, self.budget.tool_seconds)
        except AprError as error:  # its message is for readers
            return error_result("error", str(error))
        except Exception as error:
            return error_result("error", f"{type(error).__name__}: {error}")
        if text is None:
            seconds = f"{self.budget.tool_seconds:g}"
            return error_result(
                "timeout", f"the tool did not return within {seconds} seconds", "tool_seconds"
            )
        return ToolResult("ok", text)

    async def _ask_client(self, sequence: SequenceState, one: _PendingCall) -> ToolResult:
        assert self.options.run_tool is not None
        request = ToolRequest(one.id, sequence.path, one.call.name, one.call.arguments)
        waiting = self._activity.waiting_for_client() if self._activity else nullcontext()
        with waiting:
            try:
                return ToolResult("ok", await call_client(self.options.run_tool, request))
            except TimeoutError:
                return error_result("timeout", "the tool did not return in time")
            except AprError as error:
                return error_result("error", str(error))
            except Exception as error:
                return error_result("error", f"{type(error).__name__}: {error}")

    def _working(self) -> AbstractContextManager[None]:
        return self._activity.working() if self._activity else nullcontext()

    def _record(
        self,
        sequence: SequenceState,
        one: _PendingCall,
        form: ObservationForm,
        result: ToolResult,
        max_tokens: int,
        limit: str,
    ) -> None:
        """Record a call that has ended, and the limits that acted on it. `limit` is that of the sequence."""
        encoded = encode_result(sequence.graph.tokenizer, result.text, max_tokens, form.escaped)
        if result.limit:
            self.request_log.record_limit(result.limit, sequence.path)
        if encoded.truncated:
            own = max_tokens >= self.budget.tool_result_tokens
            self.request_log.record_limit("tool_result_tokens" if own else limit, sequence.path)
        one.result = encoded
        self._record_call(sequence, one, result.outcome, encoded.text, truncated=encoded.truncated)

    def _record_call(
        self,
        sequence: SequenceState,
        one: _PendingCall,
        outcome: ToolOutcome,
        result: str,
        *,
        truncated: bool = False,
    ) -> None:
        call = one.call
        self.request_log.record_tool_call(
            ToolCall(
                one.id, sequence.path, call.name, call.arguments, result, outcome,
                one.started, self.request_log.seconds, truncated,
            )
        )  # fmt: skip

    def _drop(self, sequence: SequenceState, pending: Sequence[_PendingCall]) -> None:
        """Record calls whose results have no room, and drop them from the context."""
        for one in pending:
            self._record_call(sequence, one, "length", "")
        sequence.drop_call()

    @staticmethod
    def _write(sequence: SequenceState, form: ObservationForm, pending: Sequence[_PendingCall]) -> int:
        """Append the results, each with the form before it, and with the form after the last one."""
        before = len(sequence.context)
        texts = form.pieces(len(pending))
        form_ids = encode_form(sequence.graph.tokenizer, form, len(pending))
        for k, one in enumerate(pending):
            assert one.result is not None
            text, ids = texts[k] + one.result.text, (*form_ids[k], *one.result.token_ids)
            if k == len(pending) - 1:
                text, ids = text + texts[-1], (*ids, *form_ids[-1])
            sequence.inject("observation", text, one.id, token_ids=ids)
        return len(sequence.context) - before
