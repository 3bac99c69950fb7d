"""Notices when trajectories wait for their client alone: no request runs, and no tool of the operator."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

IDLE_S = 0.01  # requests that follow one another leave gaps that are shorter


class Activity:
    """Counts what one or more trajectories do, in one event loop.

    Args:
        on_idle: Called when nothing has been busy for 10 ms while calls wait for the client. It is called once, and again
            after something was busy or another call began to wait.

    Attributes:
        busy: Requests and tools of the operator in flight.
        waiting: Calls that wait for the client.
    """

    def __init__(self, on_idle: Callable[[], None]) -> None:
        self._on_idle = on_idle
        self._timer: asyncio.TimerHandle | None = None
        self.busy = self.waiting = 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count a request, or a tool of the operator, for as long as the block runs."""
        self.busy += 1
        self._cancel_timer()
        try:
            yield
        finally:
            self.busy -= 1
            self.start_timer()

    @contextmanager
    def waiting_for_client(self) -> Iterator[None]:
        """Count a call that waits for the client for as long as the block runs."""
        self.waiting += 1
        self.start_timer()
        try:
            yield
        finally:
            self.waiting -= 1
            if self.waiting:
                self.start_timer()  # what continues may end without a request
            else:
                self._cancel_timer()

    def start_timer(self) -> None:
        """Let the 10 ms begin again, if calls wait and nothing is busy: what `on_idle` reports may have changed."""
        if self.waiting and not self.busy:
            self._cancel_timer()
            self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._fire)

    def _cancel_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        if self.waiting and not self.busy:
            self._on_idle()
