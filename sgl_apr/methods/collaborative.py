"""Thinkers that write at once and then read each other, a chunk of tokens at a time; what each of them sees is the methods'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.session import MethodSession


@dataclass
class Agent:
    """One of them: what it is writing, the tokens of all that it wrote, its last thought, whether it has ended by itself,
    or cannot go on."""

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
    thoughts: MethodSession,
    thinkers: Sequence[T],
    sees: Callable[[T], tuple[str, Prompt]],
    chunk: int,
    stop: tuple[str, ...] = (),
) -> bool:
    """Let each that has not ended write up to `chunk` tokens, at once; false if none could write any.

    What the others write meanwhile it does not see: that is how stale its view is, at most.
    """
    writing = [one for one in thinkers if not one.is_finished]
    shown = [one.last for one in thinkers if one.last]
    contexts = [(text, shown, _chunk(ask, chunk, stop)) for text, ask in map(sees, writing)]
    wrote = False
    for one, (_, _, ask), thought in zip(
        writing, contexts, await thoughts.sample_with_context(contexts), strict=True
    ):
        paused = thought.finish == "stop" and any(thought.text.endswith(end) for end in stop)
        one.ended, one.failed = thought.is_complete and not paused, thought.finish == "failed"
        one.tokens += thought.sequence.tokens_used
        if not one.failed:
            one.text += ask.text + thought.text.rstrip("\ufffd")  # a character that the chunk cuts
            one.last = thought
            wrote = wrote or thought.is_complete or bool(thought.text)
    return wrote


def _chunk(ask: Prompt, chunk: int, stop: tuple[str, ...]) -> Prompt:
    tokens = chunk if ask.tokens is None else min(chunk, ask.tokens)
    return replace(ask, tokens=tokens, stop=(*ask.stop, *stop))
