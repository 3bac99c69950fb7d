"""OpenAI's objects around a reply: a chat completion or a text completion, whole or in chunks; pure."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.runtime.events import BranchEnded, Delta, Event, Forked, Joined, TextRetracted
from sgl_apr.server.api.openai_fields import Content, finish_reason, trajectory_summary, usage
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """How a client wants to be answered.

    separate: the answer as content, the trace before it as reasoning_content. trajectory: all of it in the
    field `apr`. trunk: stream what the trunk writes only. usage: stream a last chunk with the usage.
    """

    separate_reasoning: bool = False
    trajectory: bool = False
    trunk: bool = False
    usage: bool = False


@dataclass(frozen=True, slots=True)
class OpenAIResponseBuilder:
    """What all objects of one reply have in common."""

    model: str
    chat: bool
    options_: ResponseOptions
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, trajectory: Trajectory) -> dict[str, Any]:
        """The whole reply in one object."""
        content = Content.of(trajectory, self.options_.separate_reasoning)
        if self.chat:
            message = {"role": "assistant", "content": content.text, "reasoning_content": content.reasoning}
            body: dict[str, Any] = {"message": message}
        else:
            body = {"text": content.text}
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(body, finish_reason(trajectory))],
            "usage": usage(trajectory),
            "apr": trajectory_summary(trajectory, self.options_.trajectory),
        }

    async def chunks(
        self, events: AsyncGenerator[Event | Trajectory, None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The reply in chunks, from its events and the trajectory behind them.

        Every piece of text has in `apr` the path of what wrote it: of the branches of a fork they come as
        they are written. What else happens comes with empty text. The last chunk has a finish reason and the
        structure.
        """
        begun = False
        async with aclosing(events):
            async for item in events:
                if not begun and self.chat:
                    yield self._chunk({"role": "assistant", "content": ""}, {"path": []})
                begun = True
                if isinstance(item, Trajectory):
                    for chunk in self._last(item):
                        yield chunk
                elif not self.options_.trunk or (isinstance(item, Delta | TextRetracted) and item.path == ()):
                    if isinstance(item, Delta):
                        yield self._chunk(self._text(item.text), {"path": item.path})
                    elif (note := _note(item)) is not None:
                        yield self._chunk(self._text(""), note)

    def _last(self, trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        shape = {"event": "done", **trajectory_summary(trajectory, self.options_.trajectory)}
        yield self._chunk({} if self.chat else {"text": ""}, shape, finish_reason(trajectory))
        if self.options_.usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(trajectory)}

    def _text(self, text: str) -> dict[str, Any]:
        return {"content": text} if self.chat else {"text": text}

    def _chunk(self, body: dict[str, Any], apr: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        body = {"delta": body} if self.chat else body
        return {
            **self._head("chat.completion.chunk"),
            "choices": [self._choice(body, finish)],
            "apr": apr,
        }

    def _choice(self, body: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **body, "logprobs": None, "finish_reason": finish}

    def _head(self, kind: str) -> dict[str, Any]:
        name, kind = ("chatcmpl", kind) if self.chat else ("cmpl", "text_completion")
        return {"id": f"{name}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def _note(event: Event) -> dict[str, Any] | None:
    """What a chunk without text says, None for what it says nothing of."""
    match event:
        case Forked(path, branches, first):
            named = [{"number": number, "outline": outline} for number, outline in branches]
            return {"event": "forked", "path": path, "branches": named, "first": first}
        case BranchEnded(path, outcome):
            return {"event": "branch_ended", "path": path, "outcome": outcome}
        case Joined(path, joined):
            return {"event": "joined", "path": path, "branches": joined}
        case TextRetracted(path, chars):
            return {"event": "text_retracted", "path": path, "chars": chars}
    return None
