"""A prompt of a method, and the completion that a model wrote for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.engine.quoted_text import encode_quoted
from sgl_apr.formats.tool_syntax import DecodedCall, ToolSyntax
from sgl_apr.runtime.running_completion import Watch
from sgl_apr.runtime.seeds import derive_seed
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.calls import TopLogprobs
from sgl_apr.trajectory.spans import Finish


@dataclass(frozen=True)
class Prompt:
    """What is written before a model decodes, and how it decodes.

    Attributes:
        text: Written first.
        tokens: Tokens to decode, at most; None leaves it to the budget.
        grammar: Text for the engine's grammar backend.
        stop: Texts that end decoding and stay in the output.
        sampling: SGLang's sampling parameters, over those of the run.
        tool_syntax: How calls of tools are written, if the text may end with some.
        ends_with_eos: An end-of-text token is the end that is expected, and not one in place of a closing tag.
        name: A label for people.
        quoted: What the text quotes of users, tools and models. No control token is in it, however it is spelled.
        seed: The seed of its sampling. None for that of its place in the trajectory.
        watch: Is called after each chunk of the completion, and may end it.
        depends_on: Completions that it follows in time without seeing them, if it has a context of its own.
    """

    text: str = ""
    tokens: int | None = None
    grammar: str | None = None
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tool_syntax: ToolSyntax | None = None
    ends_with_eos: bool = False
    name: str = ""
    quoted: tuple[str, ...] = ()
    seed: int | None = None
    watch: Watch | None = None
    depends_on: tuple[Completion, ...] = ()

    @property
    def without_text(self) -> Prompt:
        """The same for a context that already has the text."""
        return replace(self, text="")

    def encode(self, tokenizer: Tokenizer, *, add_special_tokens: bool = False) -> list[int]:
        """The token ids of the text."""
        return encode_quoted(tokenizer, self.text, self.quoted, add_special_tokens=add_special_tokens)

    def repeated(self, n: int) -> list[Prompt]:
        """The same without its text for each of `n` samples, each with a seed of its own if it has one."""
        if self.seed is None:
            return [self.without_text] * n
        return [replace(self, text="", seed=derive_seed(self.seed, k)) for k in range(n)]


@dataclass(frozen=True)
class Completion:
    """What a model wrote, and the sequence that it stands in.

    Attributes:
        sequence: Can be continued or forked.
        engine: Decodes for that sequence.
        text: What was decoded, without an end-of-text token.
        finish: How it ended.
        logprob: Mean log-probability of its tokens, None if there are none.
        calls: The calls of tools that the text ends with.
        cut_call: What was decoded of calls that a limit has cut, the last span of the sequence.
        top_logprobs: For each token the most likely ones in its place, if they were requested.
    """

    sequence: SequenceState
    engine: Engine | None
    text: str = ""
    finish: Finish = "stop"
    logprob: float | None = None
    calls: tuple[DecodedCall, ...] = ()
    cut_call: str = ""
    top_logprobs: tuple[TopLogprobs, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the model ended it."""
        return self.finish in ("stop", "eos")


@dataclass(frozen=True, slots=True)
class BranchStart:
    """Where a branch begins.

    Attributes:
        prompt: What is written first, and how to decode after it.
        context: The token ids before that.
        frontier: Spans that it is conditioned on.
        waits_for: Spans that it follows in time only.
    """

    prompt: Prompt
    context: tuple[int, ...] = ()
    frontier: tuple[int, ...] = ()
    waits_for: tuple[int, ...] = ()


def as_prompt(prompt: Prompt | str) -> Prompt:
    """A prompt, or a text as one."""
    return Prompt(prompt) if isinstance(prompt, str) else prompt
