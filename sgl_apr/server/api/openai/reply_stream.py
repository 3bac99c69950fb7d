"""Splits the text of a trajectory into reasoning and answer while it is written."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from sgl_apr.errors import EngineError
from sgl_apr.runtime.events import Event, Forked, Joined, SpanFinished
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.server.api.openai.reply import find_stop, split_reply, stop_prefix_chars
from sgl_apr.server.api.openai.reply_order import ReplyOrder
from sgl_apr.trajectory.spans import Path, Span
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class ReplyDelta:
    """What is new in the texts of a choice. The reasoning of a stream comes before its content."""

    reasoning: str = ""
    content: str = ""

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content)


class ReplyStream:
    """Receives the events of a trajectory, and returns deltas that add up to its `ReplyText`.

    Text of the trunk is an answer only if no fork and no call of a tool follows. It is held back until that is certain:
    from its first character on if the options leave no further fork, else until the request that decodes it has ended.

    Args:
        options: Of the trajectory.
        separate_reasoning: Whether the content is the answer alone. Otherwise it is the complete text.
        stop: Texts before which the content ends.

    Attributes:
        is_stopped: Whether the answer has contained a stop string, after which no content follows.
    """

    def __init__(self, options: ReasonOptions, *, separate_reasoning: bool, stop: Sequence[str] = ()) -> None:
        self._options, self._separate, self._stop = options, separate_reasoning, tuple(stop)
        # Text of a branch is void if the branch fails. That may happen to reasoning, but not to content.
        self._order = ReplyOrder(options, waits_for_branches=not separate_reasoning)
        grammar, tags = options.dialect.grammar, options.dialect.grammar.tag_literals
        # Under the grammar, free text has no tags. So text up to a tag is no answer.
        self._tags = re.compile("|".join(map(re.escape, tags))) if options.constrain and tags else None
        self._longest_tag = max(map(len, tags), default=0)
        self._close = grammar.closing_literal("close") if "close" in grammar.rules else ""
        self._text = ""  # of the reply so far, in the order of the text
        self._sent = self._scanned = 0  # how much of it was sent, and searched for tags
        self._boundary = 0  # what comes before is no answer
        self._finished = 0  # where the unfinished text of the trunk begins
        self._content_start: int | None = None if separate_reasoning else 0
        self._blocks: set[Path] = set()
        self._running: set[Path] = set()  # branches of the trunk that are not joined
        self._awaits_close = False
        self.is_stopped = False

    def add(self, event: Event) -> ReplyDelta:
        """Add an event, and return what can be sent then.

        Raises:
            EngineError: A request has failed, and content that was already sent is void.
        """
        void, new = self._order.add(event)
        if void:
            self._retract(void)
        self._text += new
        match event:
            case Forked(path, branches, first):
                self._blocks.add(path)
                if len(path) == 1:
                    self._running |= {(*path, first + k) for k in range(len(branches))}
            case Joined(path, branches) if len(path) == 1:
                self._running -= {(*path, number) for number in branches}
                self._boundary = self._finished = len(self._text)
                self._awaits_close = bool(self._close)
            case SpanFinished(_, span) if not span.path and span.origin != "prompt":
                self._finish_span(span)
        if self._is_in_block and new:
            self._boundary = self._finished = len(self._text)
        self._find_tags()
        return self._next_delta()

    def finish(self, trajectory: Trajectory) -> ReplyDelta:
        """Return what is left to send once the trajectory has ended.

        Raises:
            EngineError: A request has failed, and content that was already sent is void.
        """
        reply = split_reply(trajectory, separate_reasoning=self._separate, stop=self._stop)
        content = "" if self._content_start is None else self._text[self._content_start : self._sent]
        if not reply.content.startswith(content):
            raise _void_error()
        self.is_stopped = reply.is_stopped
        reasoning = "" if content else reply.reasoning[self._sent :]
        return ReplyDelta(reasoning, reply.content[len(content) :])

    @property
    def _is_in_block(self) -> bool:
        """Whether the trunk waits for its branches, so that what is written is no answer."""
        return bool(self._running) and not self._options.dialect.asynchronous

    @property
    def _is_final(self) -> bool:
        """Whether the trunk can do nothing but to write its answer."""
        options = self._options
        may_call = options.tools and options.tool_choice != "none"
        if not options.constrain or self._running or self._awaits_close or may_call:
            return False
        forks = sum(len(path) == 1 for path in self._blocks)
        max_forks, max_blocks = options.max_forks, options.budget.blocks
        return (
            "fork" not in options.dialect.grammar.rules
            or (max_forks is not None and forks >= max_forks)
            or (max_blocks is not None and len(self._blocks) >= max_blocks)
        )

    @property
    def _answer_start(self) -> int:
        """Where the answer begins, if what the trunk writes is one."""
        if not self._boundary:
            return 0
        rest = self._text[self._boundary :]
        return self._boundary + len(rest) - len(rest.lstrip())

    def _finish_span(self, span: Span) -> None:
        if self._is_in_block:
            return
        self._finished += len(span.text)
        if span.role != "text":
            self._boundary = max(self._boundary, self._finished)
        if span.role == "close":
            self._awaits_close = False

    def _find_tags(self) -> None:
        """Move the boundary to the end of the last tag in the text that the trunk writes."""
        start = max(self._boundary, self._finished, self._scanned - self._longest_tag)
        self._scanned = len(self._text)
        if self._tags is None or start == self._scanned:
            return
        for tag in self._tags.finditer(self._text, start):
            self._boundary = tag.end()
            if tag.group() == self._close:
                self._awaits_close = False

    def _next_delta(self) -> ReplyDelta:
        is_final, start = self._is_final, self._answer_start
        if self._content_start is None and is_final and start < len(self._text):
            self._content_start = start
        reasoning = content = ""
        end = self._boundary if self._content_start is None else self._content_start
        if end > self._sent:
            reasoning, self._sent = self._text[self._sent : end], end
        if self._content_start is not None and not self.is_stopped:
            end = self._content_end(start, is_final)
            if end > self._sent:
                content, self._sent = self._text[self._sent : end], end
        return ReplyDelta(reasoning, content)

    def _content_end(self, start: int, is_final: bool) -> int:
        """Up to where content can be sent: a stop string, or what may become one, is held back."""
        if not self._stop:
            return len(self._text)
        answer = self._text[start:]
        position = find_stop(answer, self._stop)
        if position is None:
            return len(self._text) - stop_prefix_chars(answer, self._stop)
        self.is_stopped = is_final
        return start + position

    def _retract(self, chars: int) -> None:
        self._text = self._text[: len(self._text) - chars]
        size = len(self._text)
        if self._content_start is not None and self._sent > max(size, self._content_start):
            raise _void_error()
        if self._separate and self._content_start is not None and self._content_start > size:
            self._content_start = None
        self._sent, self._scanned = min(self._sent, size), min(self._scanned, size)
        self._boundary, self._finished = min(self._boundary, size), min(self._finished, size)


async def reply_deltas(
    events: AsyncGenerator[Event | Trajectory, None], reply: ReplyStream
) -> AsyncGenerator[ReplyDelta | Trajectory, None]:
    """Yield what is new in a reply with the events of its trajectory, then the trajectory.

    The first delta may be empty: it is yielded with the first event, when nothing can be refused any more.
    """
    is_first = True
    async with aclosing(events):
        async for event in events:
            delta = reply.finish(event) if isinstance(event, Trajectory) else reply.add(event)
            if delta or is_first:
                yield delta
            is_first = False
            if isinstance(event, Trajectory):
                yield event


def _void_error() -> EngineError:
    return EngineError("a request failed, and a part of the content that was already sent is void")
