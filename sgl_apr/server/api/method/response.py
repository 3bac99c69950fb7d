"""Builds OpenAI's response objects of methods."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from sgl_apr.methods.registry import MethodResult
from sgl_apr.runtime.events import Event
from sgl_apr.server.api.openai.objects import ResponseObjects, choice_object
from sgl_apr.server.api.openai.stream import SequenceEvents
from sgl_apr.server.api.openai.usage import finish_reason, trajectory_summary, usage


@dataclass(frozen=True, slots=True)
class MethodResponse(ResponseObjects):
    """Build the objects of one response: the answer is the content, and all that was written the reasoning."""

    def completion(self, result: MethodResult) -> dict[str, Any]:
        """Return the complete response."""
        message = {
            "role": "assistant",
            "content": result.answer,
            "reasoning_content": self._reasoning(result),
        }
        choice = choice_object(0, {"message": message}, finish_reason(result.trajectory), None)
        return {
            **self.head("chat.completion"),
            "choices": [choice],
            "usage": usage([result.trajectory]),
            "apr": self._summary(result),
        }

    async def chunks(
        self, events: AsyncGenerator[Event | MethodResult, None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of a streamed response.

        Sequences stream as they are written if the request asks for all of them. Otherwise the answer comes in one piece,
        since nothing is the answer before the method has chosen.

        Args:
            events: The events of the method, then its result. It is closed at the end.
        """
        sequences = SequenceEvents(self, 0)
        yield self.chunk(0, {"role": "assistant", "content": ""})
        async with aclosing(events):
            async for event in events:
                if isinstance(event, MethodResult):
                    for chunk in self._last_chunks(event):
                        yield chunk
                elif self.options.all_sequences:
                    for chunk in sequences.chunks(event):
                        yield chunk

    def _last_chunks(self, result: MethodResult) -> Iterator[dict[str, Any]]:
        if not self.options.all_sequences and (reasoning := self._reasoning(result)):
            yield self.chunk(0, {"reasoning_content": reasoning})
        yield self.chunk(0, {"content": result.answer})
        summary = {"event": "done", **self._summary(result)}
        yield self.chunk(0, {}, summary, finish_reason(result.trajectory))
        if self.options.include_usage:
            head = self.head("chat.completion.chunk")
            yield {**head, "choices": [], "usage": usage([result.trajectory])}

    def _reasoning(self, result: MethodResult) -> str | None:
        """All that was written, unless it is the answer or is not wanted."""
        text = result.trajectory.text
        return text if self.options.separate_reasoning and text.strip() != result.answer.strip() else None

    def _summary(self, result: MethodResult) -> dict[str, Any]:
        summary = trajectory_summary(result.trajectory, include_trajectory=self.options.include_trajectory)
        return {"method": result.method, "label": result.label, "score": result.score, **summary}
