"""Admits trajectories: a bounded number runs at once, and a bounded number waits, first in, first out."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sgl_apr.errors import AprError
from sgl_apr.server.api.limits import RequestLimits

MAX_RETRY_AFTER_S = 600
SMOOTHING = 0.2  # weight of the last trajectory in the moving average of durations


class ServerBusy(AprError):
    """As many trajectories run and wait as the operator allows, or the request has waited for too long.

    Attributes:
        retry_after: Estimated seconds until a new request would be admitted at once.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[ServerBusy], tuple[str, int]]:
        return type(self), (str(self), self.retry_after)


class AdmissionQueue:
    """Runs at most `limits.concurrent` trajectories. Further ones wait in the order of their arrival.

    Args:
        limits: The operator's limits.
        on_change: Called with the numbers of running and of waiting trajectories when one of them has changed.

    Attributes:
        queued: Trajectories that wait now.
    """

    def __init__(
        self, limits: RequestLimits, on_change: Callable[[int, int], None] = lambda running, queued: None
    ) -> None:
        self.queued = 0
        self._limits = limits
        self._on_change = on_change
        self._slots = asyncio.Semaphore(limits.concurrent)  # its waiters are first in, first out
        self._started: dict[int, float] = {}
        self._next_id = 0
        self._mean_duration: float | None = None

    @property
    def running(self) -> int:
        """Trajectories that run now."""
        return len(self._started)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a slot, and hold it for the duration of the block.

        Cancelling the call, as for a client that has disconnected, gives the place in the queue up.

        Raises:
            ServerBusy: The queue is full, or no slot became free in time.
        """
        await self._wait()
        number, start = self._next_id, time.monotonic()
        self._next_id += 1
        self._started[number] = start
        self._on_change(self.running, self.queued)
        try:
            yield
        finally:
            del self._started[number]
            self._on_change(self.running, self.queued)
            self._slots.release()
            self._record(time.monotonic() - start)

    def retry_after(self) -> int:
        """Estimate the seconds until a request that arrives then is admitted at once.

        The queue and this request have to be served by `concurrent` slots, each of which serves one trajectory in the
        mean duration. That is a moving average, or the mean age of what runs, if that is longer.
        """
        now = time.monotonic()
        ages = [now - start for start in self._started.values()]
        mean = max(self._mean_duration or 0.0, sum(ages) / len(ages) if ages else 0.0)
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(mean * (self.queued + 1) / self._limits.concurrent)))

    async def _wait(self) -> None:
        limits = self._limits
        if not self._slots.locked():
            await self._slots.acquire()  # returns at once
            return
        running = f"{self.running} trajectories are running, as many as --apr-max-concurrent {limits.concurrent} allows"
        if self.queued >= limits.queued:
            raise ServerBusy(
                f"{running}, and {self.queued} are waiting, as many as --apr-max-queued {limits.queued} allows",
                self.retry_after(),
            )
        self.queued += 1
        self._on_change(self.running, self.queued)
        try:
            async with asyncio.timeout(limits.queue_timeout):
                await self._slots.acquire()
        except TimeoutError:
            message = f"{running}, and none ended within --apr-queue-timeout {limits.queue_timeout:g} seconds"
            raise ServerBusy(message, self.retry_after()) from None
        finally:
            self.queued -= 1
            self._on_change(self.running, self.queued)

    def _record(self, duration: float) -> None:
        mean = self._mean_duration
        self._mean_duration = duration if mean is None else mean + SMOOTHING * (duration - mean)
