"""Builds the responses of OpenAI's Responses API of a trajectory: a response, and the events of a streamed one."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from sgl_apr.server.api.http_errors import error_body
from sgl_apr.server.api.http_streams import EventFormat, named_event
from sgl_apr.server.api.openai.logprobs import LogprobsBuilder
from sgl_apr.server.api.openai.reply import ReplyText, split_reply
from sgl_apr.server.api.openai.reply_stream import ReplyDelta
from sgl_apr.server.api.openai.response_options import ResponseOptions
from sgl_apr.server.api.openai.usage import finish_reason, trajectory_summary, usage
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory

ECHOED_FIELDS = (
    "instructions", "max_output_tokens", "metadata", "reasoning", "temperature", "text", "top_logprobs", "top_p", "user",
    "safety_identifier", "prompt_cache_key",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ResponseBuilder:
    """Build the objects of one response.

    Attributes:
        model: The model's name, as the request has it.
        body: The fields of the request, some of which the response repeats.
        options: How the response should look.
        shows_summary: Whether the reasoning is its summary, too, as SGLang has it.
        tokenizer: Of the model, for log-probabilities.
        id: The response's id.
        created: Seconds since 1970.
    """

    model: str
    body: Mapping[str, Any]
    options: ResponseOptions
    shows_summary: bool = False
    tokenizer: Tokenizer | None = None
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def response(self, trajectory: Trajectory) -> dict[str, Any]:
        """Return the complete response: an item of reasoning if there is any, and a message."""
        options = self.options
        reply = split_reply(trajectory, separate_reasoning=options.separate_reasoning, stop=options.stop)
        is_cut = finish_reason(trajectory, is_stopped=reply.is_stopped) == "length"
        status = "incomplete" if is_cut else "completed"
        output = [self._message(reply.content, status, self._logprobs(trajectory, reply))]
        if reply.reasoning:
            output.insert(0, self._reasoning(reply.reasoning, "completed"))
        return {
            **self._head(status),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": output,
            "usage": response_usage(trajectory),
            "apr": trajectory_summary(trajectory, include_trajectory=options.include_trajectory),
        }

    async def events(
        self, deltas: AsyncGenerator[ReplyDelta | Trajectory, None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a streamed response. It closes `deltas` at the end."""
        items, numbers, is_first = _Items(self), count(), True

        def numbered(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for event in events:
                yield event | {"sequence_number": next(numbers)}

        async with aclosing(deltas):
            async for delta in deltas:
                if is_first:
                    begun = self._head("in_progress") | {
                        "output": [],
                        "usage": None,
                        "incomplete_details": None,
                    }
                    names = ("response.created", "response.in_progress")
                    for event in numbered({"type": name, "response": begun} for name in names):
                        yield event
                    is_first = False
                if isinstance(delta, Trajectory):
                    for event in numbered(items.finish(self.response(delta))):
                        yield event
                    continue
                for kind, text in (("reasoning", delta.reasoning), ("message", delta.content)):
                    for event in numbered(items.write(kind, text)) if text else ():
                        yield event

    def item(self, kind: str, text: str, status: str, logprobs: list[Any] | None = None) -> dict[str, Any]:
        """Return an item of the output."""
        return self._reasoning(text, status) if kind == "reasoning" else self._message(text, status, logprobs)

    def _message(self, text: str, status: str, logprobs: list[Any] | None) -> dict[str, Any]:
        return {
            "id": f"msg_{self.id[5:]}", "type": "message", "role": "assistant", "status": status,
            "content": [self.part("message", text, logprobs)],
        }  # fmt: skip

    def _reasoning(self, text: str, status: str) -> dict[str, Any]:
        summary = [{"type": "summary_text", "text": text}] if self.shows_summary and text else []
        return {
            "id": f"rs_{self.id[5:]}", "type": "reasoning", "status": status, "summary": summary,
            "content": [self.part("reasoning", text)],
        }  # fmt: skip

    @staticmethod
    def part(kind: str, text: str, logprobs: list[Any] | None = None) -> dict[str, Any]:
        """Return the only part of an item."""
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}

    def _logprobs(self, trajectory: Trajectory, reply: ReplyText) -> list[Any] | None:
        if not self.options.logprobs or self.tokenizer is None:
            return None
        content = LogprobsBuilder(self.tokenizer, self.options.top_logprobs).chat(trajectory, reply)[
            "content"
        ]
        return list(content)

    def _head(self, status: str) -> dict[str, Any]:
        echoed = {name: self.body.get(name) for name in ECHOED_FIELDS}
        return {
            "id": self.id, "object": "response", "created_at": self.created, "model": self.model, "status": status,
            **echoed, "metadata": echoed["metadata"] or {}, "text": echoed["text"] or {"format": {"type": "text"}},
            "error": None, "background": False, "store": False, "previous_response_id": None, "tools": [],
            "tool_choice": self.body.get("tool_choice") or "auto", "parallel_tool_calls": True,
            "service_tier": "default", "truncation": "disabled",
        }  # fmt: skip


class _Items:
    """The items of a streamed output, of which one is open at a time."""

    def __init__(self, builder: ResponseBuilder) -> None:
        self._builder, self._index, self._kind, self._text = builder, -1, "", ""

    def write(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        """Yield the events of text in an item of this kind."""
        if kind != self._kind:
            yield from self._close("completed")
            self._index, self._kind, self._text = self._index + 1, kind, ""
            item = self._builder.item(kind, "", "in_progress") | {"content": []}
            yield {"type": "response.output_item.added", "output_index": self._index, "item": item}
            yield {**self._place("content_part.added"), "part": self._builder.part(kind, "")}
        self._text += text
        if text:
            yield {**self._place(f"{self._name}.delta"), "delta": text} | self._no_logprobs

    def finish(self, response: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the last events, up to the complete response."""
        yield from self.write("message", "")
        message = response["output"][-1]
        yield from self._close(message["status"], message["content"][0]["logprobs"])
        name = "completed" if response["status"] == "completed" else "incomplete"
        yield {"type": f"response.{name}", "response": response}

    def _close(self, status: str, logprobs: list[Any] | None = None) -> Iterator[dict[str, Any]]:
        if not self._kind:
            return
        kind, text = self._kind, self._text
        part = self._builder.part(kind, text, logprobs)
        no_logprobs = {"logprobs": logprobs or []} if kind == "message" else {}
        yield {**self._place(f"{self._name}.done"), "text": text} | no_logprobs
        yield {**self._place("content_part.done"), "part": part}
        item = self._builder.item(kind, text, status, logprobs)
        yield {"type": "response.output_item.done", "output_index": self._index, "item": item}
        self._kind = ""

    @property
    def _name(self) -> str:
        return "reasoning_text" if self._kind == "reasoning" else "output_text"

    @property
    def _no_logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self._kind == "message" else {}

    def _place(self, event: str) -> dict[str, Any]:
        item_id = self._builder.item(self._kind, "", "")["id"]
        return {
            "type": f"response.{event}",
            "item_id": item_id,
            "output_index": self._index,
            "content_index": 0,
        }


def response_usage(trajectory: Trajectory) -> dict[str, Any]:
    """Return the usage object of the Responses API."""
    counts = usage([trajectory])
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": counts["completion_tokens_details"],
        "total_tokens": counts["total_tokens"],
        "apr": counts["apr"],
    }


def _error_event(error: BaseException) -> dict[str, Any]:
    details = error_body(error)[0]["error"]
    return {
        "type": "error",
        "sequence_number": 0,
        **{name: details[name] for name in ("code", "message", "param")},
    }


RESPONSE_EVENTS = EventFormat(named_event, _error_event, b"")
