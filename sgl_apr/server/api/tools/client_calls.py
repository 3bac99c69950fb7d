"""The calls of tools that the client of a trajectory runs: they wait until its results arrive."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sgl_apr.runtime.activity import Activity
from sgl_apr.runtime.tools.request import ToolRequest

ID_BYTES = 12  # of a session, from the system's generator: nobody guesses the id of another client's call
CALL_ID = re.compile(r"call_([0-9a-f]{%d})_\d{1,6}" % (2 * ID_BYTES))  # noqa: UP031  # it has braces


@dataclass(eq=False, slots=True)
class ClientCall:
    """One call that waits for its result.

    Attributes:
        id: Names the call for the client. It has the id of the session.
        request: The call as the trajectory has it.
        result: The result, once the client has sent it.
    """

    id: str
    request: ToolRequest
    result: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


def session_of(call_id: object) -> str | None:
    """Return the id of the session that a call belongs to, or None if it is no id of ours.

    Examples:
        >>> session_of("call_0123456789abcdef01234567_3"), session_of("call_x"), session_of(None)
        ('0123456789abcdef01234567', None, None)
    """
    found = CALL_ID.fullmatch(call_id) if isinstance(call_id, str) else None
    return found[1] if found else None


class ClientCalls:
    """The calls of one trajectory that its client runs. `run_tool` is the option of that name.

    Attributes:
        id: Names the session.
        on_idle: Called when the trajectory only waits for results, and the client does not know all of these calls.
        activity: Notices when the trajectory only waits for its client.
        sent: The calls of the last response, by id.
    """

    def __init__(self) -> None:
        self.id = secrets.token_hex(ID_BYTES)
        self.activity = Activity(self.check_idle)
        self.sent: dict[str, ClientCall] = {}
        self.on_idle: Callable[[], None] = lambda: None
        self._pending: dict[str, ClientCall] = {}
        self._count = 0

    async def run_tool(self, request: ToolRequest) -> str:
        """Return the result of a call once the client has sent it."""
        call = ClientCall(f"call_{self.id}_{self._count}", request)
        self._count += 1
        self._pending[call.id] = call
        # Where timers come before tasks, as with uvloop, a busy loop may have found it idle before this call was known.
        self.activity.start_timer()
        try:
            return await call.result
        finally:
            del self._pending[call.id]

    def check_idle(self) -> None:
        """Call `on_idle` if the trajectory only waits for results, and the client does not know all of these calls."""
        if not self.activity.busy and self._unsent():
            self.on_idle()

    def take_unsent(self) -> tuple[ClientCall, ...]:
        """Return the calls for the next response, and remember that they were sent."""
        calls = self._unsent()
        self.sent = {call.id: call for call in calls}
        return tuple(calls)

    def deliver(self, results: Mapping[str, str]) -> bool:
        """Let the calls of the last response continue with their results.

        Args:
            results: The results of all of these calls, by id.

        Returns:
            Whether a call continues. The sequence of a call may have been cut meanwhile.
        """
        continues = False
        for id_, call in self.sent.items():
            if not call.result.done():
                call.result.set_result(results[id_])
                continues = True
        self.sent = {}
        return continues

    def _unsent(self) -> list[ClientCall]:
        return [
            call for call in self._pending.values() if call.id not in self.sent and not call.result.done()
        ]
