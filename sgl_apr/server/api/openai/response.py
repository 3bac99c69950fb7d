"""Builds OpenAI's response objects of trajectories: completions, and chunks of streamed completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from sgl_apr.runtime.events import Event
from sgl_apr.server.api.openai.objects import ResponseObjects, choice_object
from sgl_apr.server.api.openai.reply_stream import ReplyStream
from sgl_apr.server.api.openai.stream import ChoiceStream, ContentStream, SequenceStream
from sgl_apr.server.api.openai.usage import finish_reason, trajectory_summary, usage
from sgl_apr.server.api.options import CheckedRequest
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class OpenAIResponseBuilder(ResponseObjects):
    """Build the objects of one response."""

    def completion(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        """Return the complete response in one object, with one choice for each trajectory.

        The structure of a single trajectory is the field `apr` of the response, that of several the field `apr` of each
        choice.
        """
        summaries = [
            {"apr": trajectory_summary(trajectory, include_trajectory=self.options.include_trajectory)}
            for trajectory in trajectories
        ]
        choices = [self._complete_choice(index, t) for index, t in enumerate(trajectories)]
        if len(choices) > 1:
            choices = [choice | summary for choice, summary in zip(choices, summaries, strict=True)]
        response = {**self.head("chat.completion"), "choices": choices, "usage": usage(trajectories)}
        return response | (summaries[0] if len(summaries) == 1 else {})

    def _complete_choice(self, index: int, trajectory: Trajectory) -> dict[str, Any]:
        reply = self.split(trajectory)
        body: dict[str, Any] = {"text": reply.content}
        if self.chat:
            message = {"role": "assistant", "content": reply.content}
            body = {"message": {**message, "reasoning_content": reply.reasoning or None}}
        finish = finish_reason(trajectory, is_stopped=reply.is_stopped)
        return choice_object(index, body, finish, self.logprobs(trajectory, reply))

    async def chunks(
        self,
        requests: Sequence[CheckedRequest],
        events: AsyncGenerator[tuple[int, Event | Trajectory], None],
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of a streamed response.

        The chunks of choices interleave. The last chunk of each choice has its finish reason and its structure.

        Args:
            requests: The request of each choice.
            events: The events of the choices, each with the index of its choice. It is closed at the end.
        """
        choices = [self.stream_choice(index, request) for index, request in enumerate(requests)]
        trajectories: dict[int, Trajectory] = {}
        async with aclosing(events):
            async for index, event in events:
                if isinstance(event, Trajectory):
                    trajectories[index] = event
                    for chunk in choices[index].finish(event):
                        yield chunk
                else:
                    for chunk in choices[index].add(event):
                        yield chunk
        if self.options.include_usage:
            ended = [trajectories[index] for index in sorted(trajectories)]
            yield self.usage_chunk(usage(ended))

    def stream_choice(
        self, index: int, request: CheckedRequest, reply: ReplyStream | None = None
    ) -> ChoiceStream:
        """Return what makes the chunks of a choice.

        Args:
            index: The index of the choice.
            request: Its request.
            reply: The stream of its text, if earlier responses had the beginning of it.
        """
        if self.options.all_sequences:
            return SequenceStream(self, index, request)
        return ContentStream(self, index, request, reply)

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the last chunk of a stream, which has the usage."""
        return {**self.head("chat.completion.chunk"), "choices": [], "usage": usage}

    def single(
        self, body: dict[str, Any], finish: str, usage: dict[str, Any], apr: dict[str, Any]
    ) -> dict[str, Any]:
        """Return a response with one choice whose trajectory has not ended."""
        choices = [choice_object(0, body, finish, None)]
        return {**self.head("chat.completion"), "choices": choices, "usage": usage, "apr": apr}
