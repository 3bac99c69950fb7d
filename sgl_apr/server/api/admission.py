"""Admits trajectories: as many run at once as the operator allows and the KV cache holds, and a bounded number waits."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from sgl_apr.errors import AprError
from sgl_apr.runtime.kv_admission import KvAdmission, Slot
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
    """Runs at most `limits.concurrent` trajectories, and no more than are expected to fit into the KV cache.

    Further ones wait in the order of their arrival. `KvAdmission` has the rule.

    Args:
        limits: The operator's limits.
        on_change: Called with the numbers of running and of waiting trajectories when one of them has changed.

    Attributes:
        queued: Trajectories that wait now.
        kv: Decides when the next one starts.
    """

    def __init__(
        self, limits: RequestLimits, on_change: Callable[[int, int], None] = lambda running, queued: None
    ) -> None:
        self.queued = 0
        self._limits = limits
        self._on_change = on_change
        self.kv = KvAdmission(limits.concurrent)
        self._started: dict[int, float] = {}
        self._next_id = 0
        self._mean_duration: float | None = None

    @property
    def running(self) -> int:
        """Trajectories that run now."""
        return len(self._started)

    @asynccontextmanager
    async def slot(self, prompt_tokens: int = 0, max_tokens: int = 0) -> AsyncIterator[Slot]:
        """Wait for a slot, and hold it for the duration of the block.

        Cancelling the call, as for a client that has disconnected, gives the place in the queue up.

        Args:
            prompt_tokens: Tokens of the prompt.
            max_tokens: Tokens that the trajectory may write.

        Raises:
            ServerBusy: The queue is full, or no slot became free in time.
        """
        async with AsyncExitStack() as stack:
            slot = await self._wait(stack, prompt_tokens, max_tokens)
            number, start = self._next_id, time.monotonic()
            self._next_id += 1
            self._started[number] = start
            self._on_change(self.running, self.queued)
            try:
                yield slot
            finally:
                del self._started[number]
                self._on_change(self.running, self.queued)
                self._record(time.monotonic() - start)

    def retry_after(self) -> int:
        """Estimate the seconds until a request that arrives then is admitted at once.

        The queue and this request have to be served by as many slots as are in use, each of which serves one
        trajectory in the mean duration. That is a moving average, or the mean age of what runs, if that is longer.
        """
        now, slots = time.monotonic(), self.running or self._limits.concurrent
        ages = [now - start for start in self._started.values()]
        mean = max(self._mean_duration or 0.0, sum(ages) / len(ages) if ages else 0.0)
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(mean * (self.queued + 1) / slots)))

    async def _wait(self, stack: AsyncExitStack, prompt_tokens: int, max_tokens: int) -> Slot:
        """Enter a slot once there is one."""
        limits, slot = self._limits, self.kv.slot(prompt_tokens, max_tokens)
        if not self.kv.must_wait(prompt_tokens, max_tokens):
            return await stack.enter_async_context(slot)  # does not wait
        if self.queued >= limits.queued:
            raise ServerBusy(
                f"{self._bound()}, and {self.queued} are waiting, as many as --apr-max-queued {limits.queued} allows",
                self.retry_after(),
            )
        self.queued += 1
        self._on_change(self.running, self.queued)
        try:
            async with asyncio.timeout(limits.queue_timeout):
                return await stack.enter_async_context(slot)
        except TimeoutError:
            message = (
                f"{self._bound()}, and none ended within --apr-queue-timeout {limits.queue_timeout:g} seconds"
            )
            raise ServerBusy(message, self.retry_after()) from None
        finally:
            self.queued -= 1
            self._on_change(self.running, self.queued)

    def _bound(self) -> str:
        """What bounds the number of running trajectories now."""
        running, allowed = self.running, self._limits.concurrent
        if running < allowed:
            return f"{running} trajectories are running, as many as fit into the KV cache of {self.kv.pool_tokens} tokens"
        return f"{running} trajectories are running, as many as --apr-max-concurrent {allowed} allows"

    def _record(self, duration: float) -> None:
        mean = self._mean_duration
        self._mean_duration = duration if mean is None else mean + SMOOTHING * (duration - mean)
