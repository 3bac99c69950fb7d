"""Chunks of one choice of a streamed completion: deltas of its message, or the text of every sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
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
from sgl_apr.server.api.openai.objects import ResponseObjects
from sgl_apr.server.api.openai.reply_stream import ReplyDelta, ReplyStream
from sgl_apr.server.api.openai.usage import finish_reason, trajectory_summary
from sgl_apr.server.api.options import CheckedRequest
from sgl_apr.trajectory.trajectory import Trajectory


class ChoiceStream(ABC):
    """The chunks of one choice."""

    def __init__(self, response: ResponseObjects, index: int, request: CheckedRequest) -> None:
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

    @abstractmethod
    def finish(self, trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        """Yield the last chunks."""

    @abstractmethod
    def _chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the chunks of an event after the first chunk."""

    def _path(self, path: tuple[int, ...]) -> dict[str, Any] | None:
        return None

    def _text(self, text: str) -> dict[str, Any]:
        return {"content": text} if self.response.chat else {"text": text}

    def _last_chunk(self, trajectory: Trajectory, *, is_stopped: bool) -> dict[str, Any]:
        include = self.response.options.include_trajectory
        summary = {"event": "done", **trajectory_summary(trajectory, include_trajectory=include)}
        finish = finish_reason(trajectory, is_stopped=is_stopped)
        return self.response.chunk(self.index, {} if self.response.chat else {"text": ""}, summary, finish)


class ContentStream(ChoiceStream):
    """Deltas of `content` and `reasoning_content`."""

    def __init__(
        self,
        response: ResponseObjects,
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
            logprobs = response.logprobs(trajectory, reply)
            yield response.chunk(self.index, self._text(reply.content), logprobs=logprobs)
        yield self._last_chunk(trajectory, is_stopped=self._reply.is_stopped)

    def _deltas(self, delta: ReplyDelta) -> Iterator[dict[str, Any]]:
        if delta.reasoning and self.response.chat:
            yield self.response.chunk(self.index, {"reasoning_content": delta.reasoning})
        if delta.content and not self.response.options.logprobs:
            yield self.response.chunk(self.index, self._text(delta.content))


class SequenceEvents:
    """The text of every sequence as it is written, with the path of the sequence in `apr`, and the other events."""

    def __init__(self, response: ResponseObjects, index: int) -> None:
        self._response, self._index = response, index

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the chunks of an event."""
        if isinstance(event, Delta):
            yield self._chunk(event.text, {"path": event.path})
        elif (summary := _event_summary(event)) is not None:
            yield self._chunk("", summary)

    def _chunk(self, text: str, apr: dict[str, Any]) -> dict[str, Any]:
        body = {"content": text} if self._response.chat else {"text": text}
        return self._response.chunk(self._index, body, apr)


class SequenceStream(ChoiceStream):
    """The chunks of `SequenceEvents`, and the last one."""

    def _path(self, path: tuple[int, ...]) -> dict[str, Any] | None:
        return {"path": path}

    def _chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        yield from SequenceEvents(self.response, self.index).chunks(event)

    def finish(self, trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        is_stopped = self.response.split(trajectory).is_stopped
        yield self._last_chunk(trajectory, is_stopped=is_stopped)


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
