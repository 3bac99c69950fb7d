"""Agents that write in parallel and read each other after every chunk of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.session import MethodSession


@dataclass
class Agent:
    """One of several agents.

    Attributes:
        text: What it is writing.
        tokens: The number of tokens that it has decoded.
        last: Its last completion.
        ended: Whether it has ended by itself.
        failed: Whether a request of it has failed for good.
    """

    text: str = ""
    tokens: int = 0
    last: Completion | None = None
    ended: bool = False
    failed: bool = False

    @property
    def is_finished(self) -> bool:
        return self.ended or self.failed


T = TypeVar("T", bound=Agent)


async def write_chunk(
    session: MethodSession,
    agents: Sequence[T],
    context_of: Callable[[T], tuple[str, Prompt]],
    chunk: int,
    stop: tuple[str, ...] = (),
) -> bool:
    """Let every unfinished agent decode up to `chunk` tokens, in parallel.

    Agents don't see what the others write in the same chunk, so their view is at most `chunk` tokens old.

    Args:
        session: Decodes.
        agents: All agents.
        context_of: The context of an agent, and the prompt that continues it.
        chunk: Tokens per agent.
        stop: Texts at which an agent pauses; they do not end it.

    Returns:
        Whether any agent could write.
    """
    writing = [agent for agent in agents if not agent.is_finished]
    visible = [agent.last for agent in agents if agent.last]
    contexts = [(text, visible, _limited(prompt, chunk, stop)) for text, prompt in map(context_of, writing)]
    wrote = False
    completions = await session.sample_with_context(contexts)
    for agent, (_, _, prompt), completion in zip(writing, contexts, completions, strict=True):
        paused = completion.finish == "stop" and any(completion.text.endswith(end) for end in stop)
        agent.ended = completion.is_complete and not paused
        agent.failed = completion.finish == "failed"
        agent.tokens += completion.sequence.tokens_used
        if not agent.failed:
            agent.text += prompt.text + completion.text.rstrip("\ufffd")  # a character that the chunk cuts
            agent.last = completion
            wrote = wrote or completion.is_complete or bool(completion.text)
    return wrote


def _limited(prompt: Prompt, chunk: int, stop: tuple[str, ...]) -> Prompt:
    tokens = chunk if prompt.tokens is None else min(chunk, prompt.tokens)
    return replace(prompt, tokens=tokens, stop=(*prompt.stop, *stop))
