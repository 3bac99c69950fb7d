"""Builds the responses of Anthropic's Messages API of a trajectory: a message, and the events of a streamed one."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.server.api.http_errors import error_body
from sgl_apr.server.api.http_streams import EventFormat, named_event
from sgl_apr.server.api.openai.reply import ReplyText, split_reply
from sgl_apr.server.api.openai.reply_stream import ReplyDelta
from sgl_apr.server.api.openai.response_options import ResponseOptions
from sgl_apr.server.api.openai.usage import finish_reason, trajectory_summary, usage
from sgl_apr.trajectory.trajectory import Trajectory

ERROR_TYPES = {400: "invalid_request_error", 503: "overloaded_error", 504: "timeout_error"}
EMPTY_BLOCKS = {
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
    "text": {"type": "text", "text": ""},
}


@dataclass(frozen=True, slots=True)
class MessageBuilder:
    """Build the objects of one response.

    Attributes:
        model: The model's name, as the request has it.
        options: How the response should look.
        shows_thinking: Whether the text before the answer is a part of the response.
        id: The response's id.
    """

    model: str
    options: ResponseOptions
    shows_thinking: bool = True
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")

    def message(self, trajectory: Trajectory) -> dict[str, Any]:
        """Return the complete response: a block of thinking if there is any, and a block of text."""
        reply = self._split(trajectory)
        content = [EMPTY_BLOCKS["text"] | {"text": reply.content}]
        if reply.reasoning and self.shows_thinking:
            content.insert(0, EMPTY_BLOCKS["thinking"] | {"thinking": reply.reasoning})
        return {
            **self._head(),
            "content": content,
            **self._ending(trajectory, reply),
            "usage": message_usage(trajectory),
            "apr": self._summary(trajectory),
        }

    async def events(
        self, deltas: AsyncGenerator[ReplyDelta | Trajectory, None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a streamed response. It closes `deltas` at the end.

        Usage is known only at the end, so the numbers of the first event are 0.
        """
        blocks = _Blocks()
        started = {"input_tokens": 0, "output_tokens": 0}
        head = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": started}
        async with aclosing(deltas):
            is_first = True
            async for delta in deltas:
                if is_first:
                    yield {"type": "message_start", "message": head}
                    is_first = False
                if isinstance(delta, Trajectory):
                    for event in self._last_events(delta, blocks):
                        yield event
                    continue
                if delta.reasoning and self.shows_thinking:
                    for event in blocks.write("thinking", delta.reasoning):
                        yield event
                if delta.content:
                    for event in blocks.write("text", delta.content):
                        yield event

    def _last_events(self, trajectory: Trajectory, blocks: _Blocks) -> Iterator[dict[str, Any]]:
        yield from blocks.write("text", "")  # a message has a text, if an empty one
        yield from blocks.close()
        reply = self._split(trajectory)
        yield {
            "type": "message_delta",
            "delta": self._ending(trajectory, reply),
            "usage": message_usage(trajectory),
            "apr": self._summary(trajectory),
        }
        yield {"type": "message_stop"}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model}

    def _split(self, trajectory: Trajectory) -> ReplyText:
        options = self.options
        return split_reply(trajectory, separate_reasoning=options.separate_reasoning, stop=options.stop)

    def _summary(self, trajectory: Trajectory) -> dict[str, Any]:
        return trajectory_summary(trajectory, include_trajectory=self.options.include_trajectory)

    @staticmethod
    def _ending(trajectory: Trajectory, reply: ReplyText) -> dict[str, Any]:
        is_cut = finish_reason(trajectory, is_stopped=reply.is_stopped) == "length"
        reason = "stop_sequence" if reply.is_stopped else "max_tokens" if is_cut else "end_turn"
        return {"stop_reason": reason, "stop_sequence": reply.stop}


class _Blocks:
    """The content blocks of a stream, of which one is open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._kind = ""

    def write(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        """Yield the events of text in a block of this kind."""
        if kind != self._kind:
            yield from self.close()
            self._index, self._kind = self._index + 1, kind
            yield {
                "type": "content_block_start",
                "index": self._index,
                "content_block": EMPTY_BLOCKS[kind],
            }
        if text:
            delta = {"type": f"{kind}_delta", kind: text}
            yield {"type": "content_block_delta", "index": self._index, "delta": delta}

    def close(self) -> Iterator[dict[str, Any]]:
        """Yield the end of the open block."""
        if self._kind:
            yield {"type": "content_block_stop", "index": self._index}
            self._kind = ""


def message_usage(trajectory: Trajectory) -> dict[str, Any]:
    """Return Anthropic's usage object. Prompt tokens that were cached are not among the input tokens."""
    counts = usage([trajectory])
    cached = counts["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": counts["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"thinking_tokens": counts["completion_tokens_details"]["reasoning_tokens"]},
        "apr": counts["apr"],
    }


def message_error(error: BaseException) -> tuple[dict[str, Any], int]:
    """Return an error as Anthropic's error object, and its HTTP status."""
    body, status = error_body(error)
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {**body["error"], "type": kind}}, status


MESSAGE_EVENTS = EventFormat(named_event, lambda error: message_error(error)[0], b"")
