"""How far a text has been read, for a progress bar in another thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class ReadingProgress:
    """The place that the parser has reached in a text.

    Attributes:
        position: Returns the number of characters that have been read.
    """

    def __init__(self) -> None:
        self.position: Callable[[], int] = lambda: 0


_CURRENT: ContextVar[ReadingProgress | None] = ContextVar("reading_progress", default=None)


@contextmanager
def follow_reading() -> Iterator[ReadingProgress]:
    """Follow the texts that this thread reads inside the block."""
    progress = ReadingProgress()
    token = _CURRENT.set(progress)
    try:
        yield progress
    finally:
        _CURRENT.reset(token)


def report_position(position: Callable[[], int]) -> None:
    """Tell who follows this thread how to find out the place that a parser has reached."""
    if (progress := _CURRENT.get()) is not None:
        progress.position = position
