"""Agents that write in parallel and read each other, after every chunk of tokens or, where the engine can, at every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError, UnsupportedEngine
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.session import MethodSession
from sgl_apr.runtime.value_checks import check_type
from sgl_apr.trajectory.worker_groups import GroupKind


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


def runs_exactly(engine: Engine, kind: GroupKind, exact: bool | None, options: Mapping[str, Any]) -> bool:
    """Decide whether agents decode as one group, in which each token sees all tokens so far.

    Args:
        engine: The engine.
        kind: The kind of the group.
        exact: Whether they have to. None: where the engine decodes such groups.
        options: The other options of the method. With tools they cannot: a worker of a group does not wait for a result.

    Raises:
        UnsupportedEngine: They have to, and the engine does not decode such groups.
        AprError: They have to, and there are tools.
    """
    if exact is not None:
        check_type("exact", exact, bool)
    has_groups, has_tools = kind in getattr(engine, "groups", ()), bool(options.get("tools"))
    if exact and not has_groups:
        raise UnsupportedEngine(
            f"exact=True, and this engine does not decode groups of kind {kind}: expected a server that `sgl-apr serve` "
            "started in a mode where groups work, or exact=None"
        )
    if exact and has_tools:
        raise AprError("exact=True with tools: a worker of a group cannot wait for the result of a tool")
    return has_groups and not has_tools and exact is not False


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
