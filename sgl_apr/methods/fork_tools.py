"""The tools of the branches of a fork: what each may call, and how its calls are answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.formats.masks.lower import lower_free_text
from sgl_apr.formats.tool_syntax import ToolSyntax
from sgl_apr.methods.fork_task import ForkTask, Merge, answer_schema
from sgl_apr.methods.prompt import Prompt
from sgl_apr.runtime.budget import Budget, lead_chars
from sgl_apr.runtime.fork_rules import PhaseLimits
from sgl_apr.runtime.option_checks import TOOL_OPTION_NAMES, check_options
from sgl_apr.runtime.options import DEFAULT_DIALECT, ReasonOptions, make_options
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.runtime.tools.rules import CallLimits, CallRules, load_syntax, make_syntax
from sgl_apr.runtime.tools.runner import ToolRunner
from sgl_apr.runtime.tools.tool import Tool

NO_DECISION = ("auto", "none")


@dataclass(frozen=True, slots=True)
class ForkToolOptions:
    """The options about tools of a fork, which hold for each task that has none of its own.

    Attributes:
        options: Those of `TOOL_OPTION_NAMES` that were given.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def pop_from(cls, options: dict[str, Any]) -> ForkToolOptions:
        """Take the options about tools out of those of a fork.

        Raises:
            AprError: One of them is wrong.
        """
        given = {name: options.pop(name) for name in TOOL_OPTION_NAMES if name in options}
        return cls(check_options(given))

    def for_task(self, task: ForkTask) -> dict[str, Any]:
        """The options about tools of a task.

        Raises:
            AprError: Its tool_choice is none of its tools, or needs one.
        """
        options = dict(self.options)
        if task.own_tools is not None:
            options["tools"] = task.own_tools
        if task.tool_choice is not None:
            options["tool_choice"] = task.tool_choice
        names = [tool.name for tool in options.get("tools", ())]
        choice = options.get("tool_choice", "auto")
        if choice not in ("auto", "none", "required", *names):
            expected = (
                f"the name of one of its tools: {', '.join(names)}" if names else "tools to choose from"
            )
            raise AprError(
                f'task {task.name}: tool_choice={choice!r}, expected "auto", "none", "required", or {expected}'
            )
        if task.tool_choice == "required" and not names:
            raise AprError(f"task {task.name}: tool_choice='required' needs tools")
        return options

    def shown_tools(self, tasks: Sequence[ForkTask]) -> list[dict[str, Any]] | None:
        """The tools of all tasks, as a chat template shows them to every branch. None if there are none.

        All branches are shown the same tools, so that their prompts begin with the same tokens.

        Raises:
            AprError: Two tasks have different tools of one name, or no task has a tool that is required.
        """
        shown: dict[str, Tool] = {}
        for task in tasks:
            for tool in self.for_task(task).get("tools", ()):
                other = shown.setdefault(tool.name, tool)
                if (other.description, other.schema) != (tool.description, tool.schema):
                    raise AprError(
                        f"the tool {tool.name!r} of task {task.name} differs from that of another task, expected one "
                        "description and one schema for each name, or different names"
                    )
        if self.options.get("tool_choice") == "required" and not shown:
            raise AprError("tool_choice='required' needs tools")
        return [tool.to_openai() for tool in shown.values()] or None

    async def load_syntax(self, engine: Engine, tasks: Sequence[ForkTask]) -> None:
        """Import what calls of tools need, before the time of the fork begins. The first time takes seconds.

        Raises:
            UnsupportedEngine: It is not known how the model calls tools.
            AprError: A tool cannot be constrained.
        """
        options = next((found for task in tasks if (found := self.for_task(task)).get("tools")), None)
        if options is not None:
            await load_syntax(make_options(DEFAULT_DIALECT, **options), engine)


class WorkerTools:
    """Answers the calls of one branch of a fork.

    Args:
        engine: Says how the model calls tools.
        options: Of the fork.
        tools: The options about tools of the task.
        budget: Limits of tools.
        recorder: Records calls and limits.

    Raises:
        UnsupportedEngine: It is not known how the model calls tools.
        AprError: A tool cannot be constrained.
    """

    def __init__(
        self,
        engine: Engine,
        options: ReasonOptions,
        tools: Mapping[str, Any],
        budget: Budget,
        recorder: TrajectoryRecorder,
    ) -> None:
        self.options = replace(options, **tools, budget=budget)
        syntax = make_syntax(self.options, engine)
        assert syntax is not None
        self.syntax = syntax
        unforced = replace(self.options, tool_choice="none" if self.options.tool_choice == "none" else "auto")
        self._rules = CallRules(unforced, syntax, recorder.request_log)
        self.runner = ToolRunner(self.options, syntax, recorder)

    def limits(self, branch: SequenceState, max_new_tokens: int, *, may_call: bool) -> CallLimits:
        """The calls that the next text of a branch may end with.

        Args:
            branch: The branch.
            max_new_tokens: Tokens that it may decode.
            may_call: No call of it was dropped for want of tokens.
        """
        limits = PhaseLimits(0, "forbidden", max_new_tokens, "tokens")
        calls = self._rules.phase_calls(branch, limits, resumed=False, may_call=may_call)
        choice = self.options.tool_choice
        has_called = any(
            span.role == "call" for span in branch.spans
        )  # since it was started, or started again
        if choice in NO_DECISION or has_called or not calls.max_calls:
            return calls
        definition = self.syntax.definition(choice)
        syntax = ToolSyntax(self.syntax.parser, (definition,)) if definition else self.syntax
        return replace(calls, syntax=syntax, choice="required")


def decoding_prompt(
    engine: Engine, task: ForkTask | Merge, calls: CallLimits | None = None, tokens: int = 0
) -> Prompt:
    """Return how the text of a task or of a merge is decoded, after a prompt that is written already.

    Args:
        engine: Decodes it.
        task: The task.
        calls: The calls of tools that it may end with, if it has tools.
        tokens: Tokens that it may have then. Before a call that is required it may use a part of them.
    """
    schema, stops, sampling = answer_schema(task.response_format), task.stops, task.sampling
    grammar = None
    if calls is not None:
        grammar = lower_free_text(
            engine.tokenizer,
            engine.grammar_backend,
            tool_syntax=calls.syntax,
            max_calls=calls.max_calls,
            call=calls.choice,
            answer_schema=schema,
            lead_chars=lead_chars(tokens) if calls.choice == "required" else None,
        )
    elif schema is not None:
        grammar = lower_free_text(engine.tokenizer, engine.grammar_backend, answer_schema=schema)
    if grammar is not None and stops:  # the grammar does not end there
        stops, sampling = (), {**sampling, "stop": list(stops)}
    return Prompt(
        tokens=task.token_limit if isinstance(task, ForkTask) else task.max_tokens,
        grammar=grammar,
        stop=stops,
        sampling=sampling,
        tool_syntax=calls.syntax if calls else None,
        ends_with_eos=True,
    )
