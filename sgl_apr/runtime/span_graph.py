"""The spans of a trajectory while it is written, in the order in which they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sgl_apr.runtime.events import Delta, Event, OnEvent, SpanFinished, TextRetracted
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.spans import Path, Span


class EventEmitter:
    """Passes events on to a listener, if there is one.

    Attributes:
        listening: Whether there is one. Check it before you make an event that is made often.
        failure: What the listener has raised. It is called by engines too, and is no error of theirs.
    """

    def __init__(self, on_event: OnEvent | None) -> None:
        self._on_event, self.listening = on_event, on_event is not None
        self.failure: Exception | None = None

    def emit(self, event: Event) -> None:
        """Call the listener."""
        if self._on_event:
            try:
                self._on_event(event)
            except Exception as error:
                self.failure = error
                raise

    def retract_text(self, path: Path, chars: int | None) -> None:
        """Emit that the last `chars` characters at `path` are void, or all of its text (None)."""
        if chars != 0:
            self.emit(TextRetracted(path, chars))

    def delta_callback(self, path: Path) -> Callable[[str], None] | None:
        """A function that emits text of the sequence at `path`. None without a listener: text then costs nothing."""
        return (lambda text: self.emit(Delta(path, text))) if self._on_event else None


class SpanGraph:
    """Appends spans, and knows the length of the longest path to each.

    Attributes:
        tokenizer: Encodes what the runtime injects.
        events: Receives `SpanFinished` for every span.
        spans: The spans so far.
    """

    def __init__(self, tokenizer: Tokenizer, events: EventEmitter) -> None:
        self.tokenizer, self.events = tokenizer, events
        self.spans: list[Span] = []
        self._path_lengths: list[int] = []

    def add(self, span: Span) -> int:
        """Append a span and return its index."""
        length = self.longest_path(span.parents + span.waits_for)
        self._path_lengths.append(length + (0 if span.origin == "prompt" else span.tokens))
        self.spans.append(span)
        index = len(self.spans) - 1
        if self.events.listening:
            self.events.emit(SpanFinished(index, span))
        return index

    def longest_path(self, ends: Sequence[int]) -> int:
        """Tokens of the longest path that ends with one of these spans. Prompts do not count."""
        if len(ends) == 1:  # as most do
            return self._path_lengths[ends[0]]
        return max([self._path_lengths[i] for i in ends], default=0)
