"""The trajectories that wait for results of tools from their clients: found again, and bounded in time, number and size."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from sgl_apr.errors import AprError
from sgl_apr.runtime.events import Event
from sgl_apr.server.api.counters import ServerCounters
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.server.api.tools.messages import Message, match_results, waiting_session
from sgl_apr.server.api.tools.session import CallsWaiting, ToolSession
from sgl_apr.trajectory.trajectory import Trajectory

ALREADY_SENT = (
    "the results of these tool calls have been sent already, and another request waits for the reply"
)
ENDED = "the trajectory that waited for the results of these tool calls has just ended: send the request once more"
NO_SESSIONS = "this server does not wait for tools of its clients: --apr-max-waiting 0"


class ToolSessions:
    """Keeps the sessions of one server, and ends those that wait for too long, or that are too many.

    If there are too many, the client with the most loses its oldest. What a client loses costs it the work so far: its next
    request starts a new trajectory from the messages.

    Args:
        limits: The operator's limits.
        counters: Counts how waiting ended.
    """

    def __init__(self, limits: RequestLimits, counters: ServerCounters) -> None:
        self._limits, self._counters = limits, counters
        self._sessions: dict[str, ToolSession] = {}
        self._waiting: dict[
            str, asyncio.TimerHandle
        ] = {}  # by session, in the order in which they began to wait
        self._ending = set[asyncio.Task[None]]()

    def check_allowed(self) -> None:
        """Check that this server has client-run tools at all.

        Raises:
            AprError: The operator has switched them off.
        """
        if not self._limits.max_waiting:
            raise AprError(NO_SESSIONS)

    def find(self, messages: Sequence[Message], owner: str) -> tuple[ToolSession, dict[str, str]] | None:
        """Return the session that waits for what the last messages of a request bring, and the results.

        Returns:
            None if there is none: the messages bring no results of calls of this server, the session has ended, it
            belongs to another client, or the messages before the calls were changed or are sent once more, which ends
            it. The request then starts a trajectory of its own.

        Raises:
            AprError: The results do not fit to the calls that wait.
        """
        id_ = waiting_session(messages)
        if id_ is None:
            return None
        session = self._sessions.get(id_)
        if session is None or session.owner != owner:
            self._counters.count_wait("unknown")
            return None
        if id_ not in self._waiting:
            raise AprError(ALREADY_SENT)
        before, after = tuple(messages[: len(session.messages)]), messages[len(session.messages) :]
        if before != session.messages or not after:  # without any: the last request once more
            self._end(id_, "restarted")
            return None
        return session, match_results(after, list(session.calls.sent))

    async def turn(
        self,
        session: ToolSession,
        messages: tuple[Message, ...] | None = None,
        results: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Event | CallsWaiting | Trajectory, None]:
        """Start a session, or continue it: `ToolSession.turn`. Then it waits again, or is forgotten.

        Args:
            session: From `find`, or a new one.
            messages: The messages of the request that continues it.
            results: The results from `find`.

        Raises:
            AprError: Another request has continued the session since `find`, or it has ended.
        """
        if messages is not None and session.id not in self._waiting:
            raise AprError(ALREADY_SENT if session.id in self._sessions else ENDED)
        self._sessions[session.id] = session
        self._stop_waiting(session)
        is_waiting = False
        try:
            async with aclosing(session.turn(results)) as events:
                async for event in events:
                    if messages is not None:  # the results were delivered
                        session.messages, messages = messages, None
                        self._counters.count_wait("continued")
                    if isinstance(event, CallsWaiting):
                        is_waiting = True
                        self._start_waiting(session)
                    yield event
        finally:
            if not is_waiting and session.waits_on:
                self._start_waiting(session)
            elif not is_waiting:
                self._sessions.pop(session.id, None)

    async def close(self) -> None:
        """End all sessions."""
        for id_ in list(self._waiting):
            self._end(id_, "cancelled")
        for session in list(self._sessions.values()):
            await session.end()
        await asyncio.gather(*self._ending)

    def _start_waiting(self, session: ToolSession) -> None:
        loop = asyncio.get_running_loop()
        self._waiting[session.id] = loop.call_later(self._limits.tool_wait, self._end, session.id, "expired")
        while self._is_too_much() and len(self._waiting) > 1:
            self._end(self._oldest_of_largest_owner(), "evicted")
        self._counters.set_waiting(len(self._waiting))

    def _stop_waiting(self, session: ToolSession) -> None:
        if timer := self._waiting.pop(session.id, None):
            timer.cancel()
            self._counters.set_waiting(len(self._waiting))

    def _is_too_much(self) -> bool:
        tokens = sum(self._sessions[id_].tokens for id_ in self._waiting)
        return len(self._waiting) > self._limits.max_waiting or tokens > self._limits.max_waiting_tokens

    def _oldest_of_largest_owner(self) -> str:
        counts = Counter(self._sessions[id_].owner for id_ in self._waiting)
        return max(
            self._waiting, key=lambda id_: counts[self._sessions[id_].owner]
        )  # the first of equals is the oldest

    def _end(self, id_: str, outcome: str) -> None:
        """End a session that waits."""
        session = self._sessions.pop(id_)
        self._stop_waiting(session)
        self._counters.count_wait(outcome)
        task = asyncio.get_running_loop().create_task(session.end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


def owner_of(authorization: str | None) -> str:
    """Return what tells clients apart: a digest of the key that they send."""
    return hashlib.sha256((authorization or "").encode()).hexdigest()
