"""How long a sequence may go on: to a deadline, or until somebody stops it; it decides nothing about why."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from sgl_apr.trajectory.spans import Finish

T = TypeVar("T")


class ScopeCancelled(Exception):
    """What was awaited was cut off: the scope that it ran in is over."""


class CancelScope:
    """A stretch of work that can be stopped from outside, with everything inside it.

    `deadline` is of the event loop's clock; the earlier of one's own and the outer one holds, and `limit`
    names where it comes from. Stopping cuts what is awaited at once; the sequence itself goes on, and closes
    what is open.
    """

    def __init__(
        self, outer: CancelScope | None = None, deadline: float | None = None, limit: str = ""
    ) -> None:
        self.reason: Finish | None = None
        self.deadline, self.limit = deadline, limit
        self._outer, self._inner = outer, list[CancelScope]()
        self._running = set[asyncio.Timeout]()
        if outer:
            outer._inner.append(self)
            if outer.reason is not None:
                self.reason, self.limit = outer.reason, outer.limit
            if outer.deadline is not None and (deadline is None or outer.deadline <= deadline):
                self.deadline, self.limit = outer.deadline, outer.limit

    @property
    def cancel_reason(self) -> Finish | None:
        """Why nothing more is to be awaited here, or None."""
        if self.reason is None and self.remaining_seconds() == 0:
            self.reason = "timeout"
        return self.reason

    def remaining_seconds(self) -> float | None:
        """Seconds until the deadline, if there is one."""
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - asyncio.get_running_loop().time())

    def cancel(self, reason: Finish, limit: str = "") -> None:
        """Cut what is under way here and inside, and let nothing more begin. The first reason stays."""
        if self.reason is None:
            self.reason, self.limit = reason, limit
        for timeout in self._running:
            if not timeout.expired():
                timeout.reschedule(asyncio.get_running_loop().time())
        for scope in self._inner:
            scope.cancel(reason, limit)

    def detach(self) -> None:
        """The work is done: the outer scope forgets it."""
        if self._outer and self in self._outer._inner:
            self._outer._inner.remove(self)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; raises `Cut` if this scope ends first, with `work` cancelled and awaited."""
        if self.cancel_reason:
            work.close()
            raise ScopeCancelled
        timeout = asyncio.timeout_at(self.deadline)
        try:
            async with timeout:
                self._running.add(timeout)
                try:
                    return await work
                finally:
                    self._running.discard(timeout)
        except TimeoutError:
            if not timeout.expired():
                raise
            self.reason = self.reason or "timeout"
            raise ScopeCancelled from None
