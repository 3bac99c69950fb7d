"""Tools in the texts of a method: how the prompt shows them, and how their calls are answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.engine.chat_template import encode_messages
from sgl_apr.errors import AprError, EngineError
from sgl_apr.formats.masks.lower import lower_free_text
from sgl_apr.methods.call_turns import decode_turns
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.runtime.branch_group import BranchGroup
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.fork_rules import PhaseLimits
from sgl_apr.runtime.option_checks import TOOL_OPTION_NAMES, check_options
from sgl_apr.runtime.options import DEFAULT_DIALECT, ReasonOptions, make_options
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.runtime.tools.rules import CallRules, load_syntax, make_syntax
from sgl_apr.runtime.tools.runner import ToolRunner

MESSAGE = "AprMessage7"
DecodeText = Callable[[Prompt, int], Awaitable[Completion]]


@dataclass(frozen=True, slots=True)
class ToolHeading:
    """What a chat template writes before the first message, with and without tools.

    Attributes:
        plain: The text without tools, up to the message.
        with_tools: The text with tools, up to the message.
        tools: The tools in OpenAI's form.
    """

    plain: str
    with_tools: str
    tools: Sequence[Mapping[str, Any]] = ()

    def shown(self, text: str) -> str:
        """A prompt with the tools. It begins with the end of `plain`, which what has the tools replaces."""
        if not text:
            return text
        for start in range(len(self.plain)):
            if text.startswith(self.plain[start:]):
                return self.with_tools + text[len(self.plain) - start :]
        return f"{self.with_tools}{text}"


async def tool_heading(engine: Engine, options: Mapping[str, Any]) -> ToolHeading | None:
    """Return how prompts of a method show its tools to the model. None without tools.

    Args:
        engine: Renders the chat template. A model without one gets a plain list of the tools.
        options: Of the method.

    Raises:
        AprError: An option about tools is wrong, or it is not known how the model calls tools.
    """
    checked = check_options({name: options[name] for name in TOOL_OPTION_NAMES if name in options})
    if not checked.get("tools"):
        return None
    made = make_options(DEFAULT_DIALECT, **checked)
    await load_syntax(made, engine)
    if made.chat_tools is None:
        return None
    message = [{"role": "user", "content": MESSAGE}]
    try:
        plain, with_tools = [
            engine.tokenizer.decode(await encode_messages(engine, message, tools)).partition(MESSAGE)
            for tools in (None, made.chat_tools)
        ]
        if with_tools[1] and made.tools[0].name in with_tools[0]:
            return ToolHeading(plain[0], with_tools[0], made.chat_tools)
    except EngineError:
        raise
    except AprError:  # there is no template, or it does not know tools
        pass
    listed = "\n".join(f"- {tool.name}: {tool.description}" for tool in made.tools)
    return ToolHeading("", f"You can call these tools:\n{listed}\n\n", made.chat_tools)


class MethodTools:
    """Answers the calls of tools in the texts of a method.

    Args:
        engine: Says how the model calls tools.
        options: Of the method, with tools.
        budget: Of the method.
        recorder: Records calls and limits.

    Raises:
        AprError: It is not known how the model calls tools, or the budget limits requests, which a method plans.
    """

    def __init__(
        self, engine: Engine, options: ReasonOptions, budget: Budget, recorder: TrajectoryRecorder
    ) -> None:
        if budget.calls is not None:
            raise AprError(f"tools in a method need a budget without calls, found calls={budget.calls}")
        syntax = make_syntax(options, engine)
        assert syntax is not None
        tool_budget = Budget(
            reserve=budget.reserve,
            tool_calls=budget.tool_calls,
            tool_seconds=budget.tool_seconds,
            tool_result_tokens=budget.tool_result_tokens,
        )
        self._options = replace(options, budget=tool_budget)
        _check_choice(options)
        self._rules = CallRules(self._options, syntax, recorder.request_log)
        self._runner = ToolRunner(self._options, syntax, recorder)

    @staticmethod
    def may_call(prompt: Prompt) -> bool:
        """Whether the text after a prompt may call tools: it is free text."""
        return prompt.grammar is None

    async def decode(
        self,
        engine: Engine,
        sequence: SequenceState,
        prompt: Prompt,
        tokens: int,
        decode_text: DecodeText,
        group: BranchGroup | None,
    ) -> Completion:
        """Decode, run the calls, and continue, until a text ends without calls.

        Args:
            engine: Of the sequence.
            sequence: The sequence that continues.
            prompt: How to decode each text.
            tokens: Tokens of all texts and results.
            decode_text: Decodes one text, with a prompt and so many tokens.
            group: The group that the sequence is a branch of.

        Returns:
            The last text.
        """

        async def decode(left: int, may_call: bool) -> Completion:
            return await decode_text(self._constrained(engine, sequence, prompt, left, may_call), left)

        return await decode_turns(self._runner, engine, sequence, decode, tokens, group)

    def _constrained(
        self, engine: Engine, sequence: SequenceState, prompt: Prompt, tokens: int, may_call: bool
    ) -> Prompt:
        """The prompt with the mask of its text and its calls."""
        limits = PhaseLimits(0, "forbidden", tokens, "tokens")
        calls = self._rules.phase_calls(sequence, limits, resumed=False, may_call=may_call)
        grammar = lower_free_text(
            engine.tokenizer,
            engine.grammar_backend,
            tool_syntax=calls.syntax,
            max_calls=calls.max_calls,
            call=calls.choice,
        )
        sampling = {**prompt.sampling, "stop": list(prompt.stop)} if prompt.stop else prompt.sampling
        return replace(prompt, grammar=grammar, stop=(), sampling=sampling, tool_syntax=calls.syntax)


def _check_choice(options: ReasonOptions) -> None:
    """Check that no call is required: which text of a method would have to make it is not defined."""
    if options.tool_choice not in ("auto", "none"):
        raise AprError(f'tool_choice={options.tool_choice!r} in a method, expected "auto" or "none"')
