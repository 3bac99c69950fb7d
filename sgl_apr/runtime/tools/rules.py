"""Which tools the next phase of a sequence may call, and how many times."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError, UnsupportedEngine
from sgl_apr.formats.masks.tool_checks import check_tools
from sgl_apr.formats.tool_syntax import ToolDefinition, ToolSyntax, tool_syntax
from sgl_apr.runtime.fork_rules import PhaseLimits
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.request_log import RequestLog
from sgl_apr.runtime.sequence import SequenceState

MAX_CALLS = 8  # of one phase: the mask writes them out
MIN_CALL_TOKENS = 24  # a phase with fewer tokens left has no calls, which would only be cut


@dataclass(frozen=True, slots=True)
class CallLimits:
    """The calls that one phase may end with.

    Attributes:
        syntax: The tools, and the form of a call.
        max_calls: How many calls, 0 for none.
        choice: Whether the phase may call a tool, or has to.
        resumed: The phase continues after the results of calls.
        is_parsed: What the phase writes in the form of a call is one. Otherwise it is text.
    """

    syntax: ToolSyntax
    max_calls: int = 0
    choice: Literal["auto", "required"] = "auto"
    resumed: bool = False
    is_parsed: bool = True

    @property
    def parsed_syntax(self) -> ToolSyntax | None:
        """The form of the calls in what the phase writes, None if there are none."""
        return self.syntax if self.is_parsed else None


def make_syntax(options: ReasonOptions, engine: Engine) -> ToolSyntax | None:
    """Return the syntax of the tools of a trajectory. None without tools. Its first use imports parts of SGLang.

    Raises:
        UnsupportedEngine: It is not known how the model calls tools.
        AprError: A tool cannot be constrained.
    """
    if not options.tools:
        return None
    parser = options.tool_call_parser or getattr(engine, "tool_call_parser", None)
    if not parser:
        raise UnsupportedEngine(
            "the server does not say how its model calls tools: start it with --tool-call-parser NAME, "
            "or give tool_call_parser=NAME"
        )
    definitions = [ToolDefinition.from_schema(t.name, t.description, t.schema) for t in options.tools]
    syntax = tool_syntax(parser, definitions)
    if options.constrain:
        check_tools(syntax, engine.tokenizer, engine.grammar_backend)
    return syntax


async def load_syntax(options: ReasonOptions, engine: Engine) -> None:
    """Import what `make_syntax` needs, which takes seconds, in a thread."""
    await asyncio.to_thread(make_syntax, options, engine)


def max_phase_calls(options: ReasonOptions, syntax: ToolSyntax) -> int:
    """Return how many calls one phase may end with."""
    return MAX_CALLS if options.parallel_tool_calls and syntax.allows_parallel else 1


class CallRules:
    """Applies the options and the budget of one trajectory to its calls of tools.

    Args:
        options: What was asked for.
        syntax: Of its tools.
        request_log: Records the limits that act.
    """

    def __init__(self, options: ReasonOptions, syntax: ToolSyntax, request_log: RequestLog) -> None:
        self.options, self.syntax, self.request_log = options, syntax, request_log
        self._max_calls = max_phase_calls(options, syntax)
        forced = options.tool_choice not in ("auto", "none")
        self._forced: ToolSyntax | None = None
        if forced and options.tool_choice != "required":
            definition = syntax.definition(options.tool_choice)
            if definition is None:
                raise AprError(f"tool_choice={options.tool_choice!r}, which is none of the tools")
            self._forced = ToolSyntax(syntax.parser, (definition,))
        elif forced:
            self._forced = syntax

    def phase_calls(
        self, sequence: SequenceState, limits: PhaseLimits, *, resumed: bool, may_call: bool = True
    ) -> CallLimits:
        """The calls of the next phase of a sequence.

        Args:
            sequence: The sequence that continues.
            limits: Bounds of the phase.
            resumed: The phase continues after results, or after a call that was cut.
            may_call: No call of the sequence was cut by its limit.
        """
        max_calls = self._affordable_calls(sequence, limits) if may_call else 0
        forced = self._forced and not sequence.path and not sequence.tool_calls and limits.fork != "required"
        if max_calls and forced and self._forced:
            return CallLimits(self._forced, max_calls, "required", resumed)
        return CallLimits(self.syntax, max_calls, "auto", resumed, self.options.tool_choice != "none")

    def _affordable_calls(self, sequence: SequenceState, limits: PhaseLimits) -> int:
        """How many calls the budget leaves a phase. The limit that rules out all of them is recorded."""
        if self.options.tool_choice == "none":
            return 0
        allowance = sequence.allowance
        if allowance.tool_calls < 1:
            self.request_log.record_limit("tool_calls", sequence.path)
            return 0
        if allowance.calls < 2:  # this request, and the one that reads the results
            if allowance.calls == 1:
                self.request_log.record_limit("calls", sequence.path)
            return 0
        if limits.max_new_tokens < MIN_CALL_TOKENS:
            return 0
        return min(allowance.tool_calls, self._max_calls)
