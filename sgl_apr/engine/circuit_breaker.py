"""Whether the server is there: while it is not, all requests wait for one health check; no HTTP in here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from sgl_apr.errors import EngineError

Probe = Callable[[], Awaitable[None]]  # raises unless the server is well
PROBE_BACKOFF_S, MAX_PROBE_BACKOFF_S = 0.1, 2.0  # seconds between two probes, doubling


class CircuitBreaker:
    """Up until a connection fails, then down until a probe succeeds.

    However many wait in `ready`, one probe is under way, and none once nobody waits. They wait until
    `reconnect_timeout` seconds after the server was found down; whoever comes later waits for a single probe.
    """

    def __init__(self, url: str, probe: Probe, reconnect_timeout: float = 0.0) -> None:
        self.url, self.reconnect_timeout, self._probe = url, reconnect_timeout, probe
        self.error: Exception | None = None  # why the server is held to be down; None while it is up
        self._since = 0.0
        self._waiting = 0
        self._check: asyncio.Task[bool] | None = None

    def record_failure(self, error: Exception) -> None:
        """A connection failed: the circuit is down."""
        if self.error is None:
            self._since = time.monotonic()
        self.error = error

    async def wait_until_up(self) -> None:
        """Return once the circuit is up; raises `EngineError` if reconnect_timeout ends first."""
        if self.error is None:
            return
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._recovers())
        check = self._check
        self._waiting += 1
        try:
            await asyncio.wait([check])
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._stop()
        # What the check found counts, though a connection from before the outage may have failed since.
        if check.cancelled() or not check.result():
            down = time.monotonic() - self._since
            reason = self.error or type(self.error).__name__
            raise EngineError(f"no server at {self.url} for {down:.0f} s: {reason}") from self.error

    async def close(self) -> None:
        """Give up the check; whoever waits for it fails."""
        if check := self._stop():
            await asyncio.wait([check])

    def _stop(self) -> asyncio.Task[bool] | None:
        check, self._check = self._check, None
        if check:
            check.cancel()
        return check

    async def _recovers(self) -> bool:
        """Probe until the server is up or reconnect_timeout is at its end, but once at least."""
        pause = PROBE_BACKOFF_S
        while True:
            try:
                await self._probe()
            except Exception as error:  # whatever it is, no server was found
                self.record_failure(error)
            else:
                self.error = None
                return True
            left = self._since + self.reconnect_timeout - time.monotonic()
            if left <= 0:
                return False
            await asyncio.sleep(min(pause, left))
            pause = min(2 * pause, MAX_PROBE_BACKOFF_S)
