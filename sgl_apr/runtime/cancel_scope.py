"""Cancels what a sequence awaits, at a deadline or on request, with everything inside it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from sgl_apr.trajectory.spans import Finish

T = TypeVar("T")


class ScopeCancelled(Exception):
    """The scope that the work ran in was cancelled, or its deadline has passed."""


class CancelScope:
    """Work that can be cancelled from outside, with all scopes inside it.

    Cancelling ends what is awaited at once. The sequence itself continues without requests, and closes what is open.

    Args:
        outer: The scope around this one. The earlier of both deadlines holds.
        deadline: On the event loop's clock.
        limit: Names the limit that the deadline comes from.
        expects_cancel: It may well be cancelled, so what has been written until then has to arrive token by token.
    """

    def __init__(
        self,
        outer: CancelScope | None = None,
        deadline: float | None = None,
        limit: str = "",
        *,
        expects_cancel: bool = False,
    ) -> None:
        self.reason: Finish | None = None
        self.deadline, self.limit = deadline, limit
        self.expects_cancel: bool = expects_cancel or (outer is not None and outer.expects_cancel)
        self._outer = outer
        self._inner: list[CancelScope] = []
        self._running: set[asyncio.Timeout] = set()
        if outer:
            outer._inner.append(self)
            if outer.reason is not None:
                self.reason, self.limit = outer.reason, outer.limit
            if outer.deadline is not None and (deadline is None or outer.deadline <= deadline):
                self.deadline, self.limit = outer.deadline, outer.limit

    @property
    def is_unlimited(self) -> bool:
        """Whether it has no deadline, and was not cancelled."""
        return self.deadline is None and self.reason is None

    @property
    def may_be_cancelled(self) -> bool:
        """Whether it is expected to end before its work does."""
        return self.deadline is not None or self.expects_cancel

    @property
    def cancel_reason(self) -> Finish | None:
        """Why nothing may be awaited any more, or None."""
        if self.reason is None and self.remaining_seconds() == 0:
            self.reason = "timeout"
        return self.reason

    def remaining_seconds(self) -> float | None:
        """Seconds until the deadline, if there is one."""
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - asyncio.get_running_loop().time())

    def cancel(self, reason: Finish, limit: str = "") -> None:
        """Cancel what runs here and inside, and let nothing start. The first reason stays."""
        if self.reason is None:
            self.reason, self.limit = reason, limit
        for timeout in self._running:
            if not timeout.expired():
                timeout.reschedule(asyncio.get_running_loop().time())
        for scope in self._inner:
            scope.cancel(reason, limit)

    def detach(self) -> None:
        """Leave the outer scope, once the work is done."""
        if self._outer and self in self._outer._inner:
            self._outer._inner.remove(self)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`.

        Raises:
            ScopeCancelled: The scope was cancelled first. `work` has been cancelled and awaited.
        """
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
            self._expire()
            raise ScopeCancelled from None

    async def run_until_cancelled(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`; None if the scope was cancelled first."""
        try:
            return await self.run(work)
        except ScopeCancelled:
            return None

    def _expire(self) -> None:
        """Note that the deadline has passed, here and inside, where it holds too.

        A timer may fire a little before the time that the clock shows, so that the clock alone does not tell.
        """
        self.reason = self.reason or "timeout"
        for scope in self._inner:
            scope._expire()
