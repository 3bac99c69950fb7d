"""Builds OpenAI's response objects of trajectories: completions, and chunks of streamed completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.runtime.events import (
    BranchEnded,
    Delta,
    Event,
    Forked,
    Joined,
    TextRetracted,
    ToolCalled,
    ToolReturned,
)
from sgl_apr.server.api.openai_logprobs import LogprobsBuilder
from sgl_apr.server.api.openai_usage import finish_reason, trajectory_summary, usage
from sgl_apr.server.api.options import CheckedRequest
from sgl_apr.server.api.reply import ReplyText, split_reply
from sgl_apr.server.api.reply_stream import ReplyDelta, ReplyStream
from sgl_apr.server.api.response_options import ResponseOptions as ResponseOptions
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class OpenAIResponseBuilder:
    """Build the objects of one response.

    Attributes:
        model: The model's name, as the request has it.
        chat: Whether to build chat completions or text completions.
        options: How the response should look.
        tokenizer: Of the model, for log-probabilities.
        id: The response's id, without its prefix.
        created: Seconds since 1970.
    """

    model: str
    chat: bool
    options: ResponseOptions
    tokenizer: Tokenizer | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

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
        response = {**self._head("chat.completion"), "choices": choices, "usage": usage(trajectories)}
        return response | (summaries[0] if len(summaries) == 1 else {})

    def _complete_choice(self, index: int, trajectory: Trajectory) -> dict[str, Any]:
        reply = self.split(trajectory)
        body: dict[str, Any] = {"text": reply.content}
        if self.chat:
            message = {"role": "assistant", "content": reply.content}
            body = {"message": {**message, "reasoning_content": reply.reasoning or None}}
        finish = finish_reason(trajectory, is_stopped=reply.is_stopped)
        return _choice(index, body, finish, self._logprobs(trajectory, reply))

    def split(self, trajectory: Trajectory) -> ReplyText:
        """Split the text of a trajectory into reasoning and content."""
        options = self.options
        return split_reply(trajectory, separate_reasoning=options.separate_reasoning, stop=options.stop)

    def _logprobs(self, trajectory: Trajectory, reply: ReplyText) -> dict[str, Any] | None:
        if not self.options.logprobs or self.tokenizer is None:
            return None
        builder = LogprobsBuilder(self.tokenizer, self.options.top_logprobs)
        return builder.chat(trajectory, reply) if self.chat else builder.text(trajectory, reply)

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
    ) -> _ChoiceStream:
        """Return what makes the chunks of a choice.

        Args:
            index: The index of the choice.
            request: Its request.
            reply: The stream of its text, if earlier responses had the beginning of it.
        """
        if self.options.all_sequences:
            return _SequenceStream(self, index, request)
        return _ContentStream(self, index, request, reply)

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the last chunk of a stream, which has the usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def single(
        self, body: dict[str, Any], finish: str, usage: dict[str, Any], apr: dict[str, Any]
    ) -> dict[str, Any]:
        """Return a response with one choice whose trajectory has not ended."""
        choices = [_choice(0, body, finish, None)]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage, "apr": apr}

    def chunk(
        self,
        index: int,
        body: dict[str, Any],
        apr: dict[str, Any] | None = None,
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return a chunk of one choice.

        Args:
            index: The index of the choice.
            body: The delta of a chat completion, or the text of a text completion.
            apr: The field `apr`, if the chunk has one.
            finish: The finish reason.
            logprobs: The log-probabilities of the text.
        """
        body = {"delta": body} if self.chat else body
        chunk = {**self._head("chat.completion.chunk"), "choices": [_choice(index, body, finish, logprobs)]}
        if self.options.include_usage:
            chunk["usage"] = None
        return chunk if apr is None else {**chunk, "apr": apr}

    def _head(self, chat_object: str) -> dict[str, Any]:
        prefix, object_ = ("chatcmpl", chat_object) if self.chat else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self.id}", "object": object_, "created": self.created, "model": self.model}


class _ChoiceStream:
    """The chunks of one choice."""

    def __init__(self, response: OpenAIResponseBuilder, index: int, request: CheckedRequest) -> None:
        self.response, self.index = response, index
        self._is_first = True

    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the chunks of an event."""
        yield from self.start()
        yield from self._chunks(event)

    def start(self) -> Iterator[dict[str, Any]]:
        """Yield the chunk that comes first, unless it was yielded before."""
        if self._is_first and self.response.chat:
            yield self.response.chunk(self.index, {"role": "assistant", "content": ""}, self._path(()))
        self._is_first = False

    def finish(self, trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        """Yield the last chunks."""
        raise NotImplementedError

    def _chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _path(self, path: tuple[int, ...]) -> dict[str, Any] | None:
        return None

    def _text(self, text: str) -> dict[str, Any]:
        return {"content": text} if self.response.chat else {"text": text}

    def _last_chunk(self, trajectory: Trajectory, *, is_stopped: bool) -> dict[str, Any]:
        include = self.response.options.include_trajectory
        summary = {"event": "done", **trajectory_summary(trajectory, include_trajectory=include)}
        finish = finish_reason(trajectory, is_stopped=is_stopped)
        return self.response.chunk(self.index, {} if self.response.chat else {"text": ""}, summary, finish)


class _ContentStream(_ChoiceStream):
    """Deltas of `content` and `reasoning_content`."""

    def __init__(
        self,
        response: OpenAIResponseBuilder,
        index: int,
        request: CheckedRequest,
        reply: ReplyStream | None = None,
    ) -> None:
        super().__init__(response, index, request)
        options = response.options
        self._reply = reply or ReplyStream(
            request.options, separate_reasoning=options.separate_reasoning, stop=options.stop
        )

    def _chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        yield from self._deltas(self._reply.add(event))

    def finish(self, trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        response = self.response
        yield from self._deltas(self._reply.finish(trajectory))
        if response.options.logprobs:  # they are known when a request has ended, and their tokens with them
            reply = response.split(trajectory)
            logprobs = response._logprobs(trajectory, reply)
            yield response.chunk(self.index, self._text(reply.content), logprobs=logprobs)
        yield self._last_chunk(trajectory, is_stopped=self._reply.is_stopped)

    def _deltas(self, delta: ReplyDelta) -> Iterator[dict[str, Any]]:
        if delta.reasoning and self.response.chat:
            yield self.response.chunk(self.index, {"reasoning_content": delta.reasoning})
        if delta.content and not self.response.options.logprobs:
            yield self.response.chunk(self.index, self._text(delta.content))


class _SequenceStream(_ChoiceStream):
    """The text of every sequence as it is written, with the path of the sequence in `apr`, and the other events."""

    def _path(self, path: tuple[int, ...]) -> dict[str, Any] | None:
        return {"path": path}

    def _chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Delta):
            yield self.response.chunk(self.index, self._text(event.text), self._path(event.path))
        elif (summary := _event_summary(event)) is not None:
            yield self.response.chunk(self.index, self._text(""), summary)

    def finish(self, trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        is_stopped = self.response.split(trajectory).is_stopped
        yield self._last_chunk(trajectory, is_stopped=is_stopped)


def _choice(
    index: int, body: dict[str, Any], finish: str | None, logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish}


def _event_summary(event: Event) -> dict[str, Any] | None:
    """Return the field `apr` of a chunk without text, or None if the event is not streamed."""
    match event:
        case Forked(path, branches, first):
            numbered = [{"number": number, "outline": outline} for number, outline in branches]
            return {"event": "forked", "path": path, "branches": numbered, "first_branch": first}
        case BranchEnded(path, outcome):
            return {"event": "branch_ended", "path": path, "outcome": outcome}
        case Joined(path, branches):
            return {"event": "joined", "path": path, "branches": branches}
        case TextRetracted(path, chars):
            return {"event": "text_retracted", "path": path, "chars": chars}
        case ToolCalled(path, id_, name, arguments):
            return {"event": "tool_called", "path": path, "id": id_, "name": name, "arguments": arguments}
        case ToolReturned(_, call):
            return {"event": "tool_returned", "path": call.path, "id": call.id, "outcome": call.outcome}
    return None
