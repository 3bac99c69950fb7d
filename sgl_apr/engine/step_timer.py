"""Measures how long a decoding step takes, by how many requests run, from the chunks that this client receives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

AVERAGING_WINDOW = 32  # steps that a mean covers
BUCKET_COUNT = 11  # 1, 2-3, 4-7, ..., 1024 and more requests


@dataclass(slots=True)
class Bucket:
    """Means over the chunks received while about this many requests ran: plain at first, then weighted by age."""

    chunks: int = 0
    running: float = 0.0
    seconds: float = 0.0


class StepTimer:
    """Counts the running requests of this process and measures the decoding steps that they take part in.

    Examples:
        >>> timer = StepTimer()
        >>> with timer.running():
        ...     timer.record_step(2, 0.5)
        >>> timer.steps
        ((1.0, 0.25),)
    """

    def __init__(self) -> None:
        self._running = 0
        self._buckets = [Bucket() for _ in range(BUCKET_COUNT)]

    @contextmanager
    def running(self, requests: int = 1) -> Iterator[None]:
        """Count one more running request, or several, inside the `with` block."""
        self._running += requests
        try:
            yield
        finally:
            self._running -= requests

    def record_step(self, tokens: int, seconds: float) -> None:
        """Record a chunk of a running request.

        Do not record a request's first chunk, whose time includes queueing and prefill.

        Args:
            tokens: Tokens of the chunk.
            seconds: Seconds since the previous chunk of the same request.
        """
        running = self._running
        bucket = self._buckets[min(running.bit_length(), BUCKET_COUNT) - 1]
        bucket.chunks += 1
        # Every running request receives a chunk of the same step, so the weight of one chunk falls with their number.
        weight = 1 / min(bucket.chunks, AVERAGING_WINDOW * running)
        bucket.seconds += weight * (seconds / tokens - bucket.seconds)
        bucket.running += weight * (running - bucket.running)

    @property
    def steps(self) -> tuple[tuple[float, float], ...]:
        """The measurements as `Load.steps`: mean requests running and seconds per step, ascending."""
        return tuple((b.running, b.seconds) for b in self._buckets if b.chunks)
