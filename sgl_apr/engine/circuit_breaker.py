"""A circuit breaker: while the server is down, all requests wait for one health check."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from sgl_apr.engine.http_errors import one_line
from sgl_apr.errors import EngineError

Probe = Callable[[], Awaitable[None]]  # raises unless the server is healthy
PROBE_BACKOFF_S, MAX_PROBE_BACKOFF_S = 0.1, 2.0  # seconds between two probes, doubling


class CircuitBreaker:
    """Up until a connection fails, then down until a probe succeeds.

    However many requests wait in `wait_until_up`, one probe runs at a time, and none once no request waits.

    Args:
        url: The server, for messages.
        probe: Checks the server. It raises unless the server is healthy.
        reconnect_timeout: Requests wait until this many seconds after the server was found down. Later requests
            wait for a single probe.
    """

    def __init__(self, url: str, probe: Probe, reconnect_timeout: float = 0.0) -> None:
        self.url, self.reconnect_timeout, self._probe = url, reconnect_timeout, probe
        self.error: Exception | None = None  # why the circuit is down; None while it is up
        self._since = 0.0
        self._waiting = 0
        self._check: asyncio.Task[bool] | None = None

    def record_failure(self, error: Exception) -> None:
        """Open the circuit because a connection failed."""
        if self.error is None:
            self._since = time.monotonic()
        self.error = error

    async def wait_until_up(self) -> None:
        """Return once the circuit is up.

        Raises:
            EngineError: If `reconnect_timeout` ends first.
        """
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
        # The result of the check counts, although an older connection may have failed since.
        if check.cancelled() or not check.result():
            down = time.monotonic() - self._since
            reason = one_line(self.error) or type(self.error).__name__
            raise EngineError(f"no server at {self.url} for {down:.0f} s: {reason}") from self.error

    async def close(self) -> None:
        """Cancel the check. Requests that wait for it fail."""
        if check := self._stop():
            await asyncio.wait([check])

    def _stop(self) -> asyncio.Task[bool] | None:
        check, self._check = self._check, None
        if check:
            check.cancel()
        return check

    async def _recovers(self) -> bool:
        """Probe until the server is up or `reconnect_timeout` has passed, at least once."""
        pause = PROBE_BACKOFF_S
        while True:
            try:
                await self._probe()
            except Exception as error:  # whatever it is, the server is not healthy
                self.record_failure(error)
            else:
                self.error = None
                return True
            left = self._since + self.reconnect_timeout - time.monotonic()
            if left <= 0:
                return False
            await asyncio.sleep(min(pause, left))
            pause = min(2 * pause, MAX_PROBE_BACKOFF_S)
