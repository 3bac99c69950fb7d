"""Seconds of a decoding step by how many requests run, measured on the answers heard here; it asks no server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

AVERAGING_WINDOW = 32  # steps that a mean looks back on
BUCKET_COUNT = 11  # 1, 2-3, 4-7, ..., 1024 and more requests


@dataclass(slots=True)
class Bucket:
    """Means over the chunks heard while about so many requests ran: plain at first, then weighted by age."""

    chunks: int = 0
    running: float = 0.0
    seconds: float = 0.0


class StepTimer:
    """Counts this process's requests under way, and how long the steps take that they decode in.

    >>> meter = Meter()
    >>> with meter.running():
    ...     meter.step(2, 0.5)
    >>> meter.steps
    ((1.0, 0.25),)
    """

    def __init__(self) -> None:
        self._running = 0
        self._buckets = [Bucket() for _ in range(BUCKET_COUNT)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """One request more is under way."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def record_step(self, tokens: int, seconds: float) -> None:
        """A running request heard so many tokens, so long after those before. Not for its first tokens:
        queueing and prefill are no decoding."""
        running = self._running
        bucket = self._buckets[min(running.bit_length(), BUCKET_COUNT) - 1]
        bucket.chunks += 1
        # Every request hears of the same step: with many of them a chunk is a small part of one.
        weight = 1 / min(bucket.chunks, AVERAGING_WINDOW * running)
        bucket.seconds += weight * (seconds / tokens - bucket.seconds)
        bucket.running += weight * (running - bucket.running)

    @property
    def steps(self) -> tuple[tuple[float, float], ...]:
        """What was measured, as `Load.steps`: mean requests running and seconds a step, ascending."""
        return tuple((b.running, b.seconds) for b in self._buckets if b.chunks)
