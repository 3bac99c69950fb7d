"""A trajectory that waits on the server while its client runs tools, over several HTTP requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from sgl_apr.errors import EngineError
from sgl_apr.runtime.events import Event, OnEvent, SpanFinished
from sgl_apr.server.api.admission import AdmissionQueue
from sgl_apr.server.api.client_calls import ClientCall, ClientCalls
from sgl_apr.server.api.options import CheckedRequest
from sgl_apr.server.api.tool_messages import Message
from sgl_apr.trajectory.trajectory import Trajectory

Run = Callable[[CheckedRequest, OnEvent], Coroutine[Any, Any, Trajectory]]


@dataclass(frozen=True, slots=True)
class CallsWaiting:
    """The end of a response: the trajectory waits until the client has run these calls."""

    calls: tuple[ClientCall, ...]


class ToolSession:
    """Runs one trajectory whose client runs tools.

    Each request of the client is a turn, during which the trajectory has a place among those that run. Between turns it has
    none: all that it does is to wait.

    Args:
        calls: The calls of the trajectory. `request` has their function as an option.
        request: The request of the trajectory.
        run: Runs a trajectory, without waiting for a place.
        admission: Gives places.
        owner: Who may continue the trajectory.

    Attributes:
        id: Names the session. It is part of the ids of its calls.
        messages: The messages of the last request. Those of the next one have to begin with them.
        tokens: Tokens of the prompt, and written so far.
        has_ended: Whether the trajectory has ended.
        is_running: Whether a request of the client is being answered.
    """

    def __init__(
        self,
        calls: ClientCalls,
        request: CheckedRequest,
        messages: tuple[Message, ...],
        run: Run,
        admission: AdmissionQueue,
        owner: str,
    ) -> None:
        self.id, self.calls, self.request, self.messages, self.owner = calls.id, calls, request, messages, owner
        self.tokens = len(request.prompt)
        self.is_running = False
        self._run, self._admission = run, admission
        self._queue = asyncio.Queue[Event | CallsWaiting | None]()
        self._task: asyncio.Task[Trajectory] | None = None

    @property
    def has_ended(self) -> bool:
        return self._task is not None and self._task.done()

    def report_waiting(self) -> None:
        """End the turn: the trajectory only waits for its client. Between turns, the next turn reports it."""
        if self.is_running:
            self._queue.put_nowait(CallsWaiting(self.calls.take_unsent()))

    async def turn(
        self, results: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Event | CallsWaiting | Trajectory, None]:
        """Continue the trajectory, and yield its events, then the calls that wait or the trajectory.

        Closing the generator before that ends the trajectory.

        Args:
            results: The results of the calls of the last turn, by id. None for the first turn.

        Raises:
            ServerBusy: There was no place in time. The trajectory waits on, and the turn can be repeated.
            AprError: The trajectory failed.
        """
        self.is_running = True
        is_complete = has_place = False
        try:
            async with self._admission.slot(self.tokens, self.request.options.budget.tokens) as slot:
                has_place = True
                self._continue(results)
                while (item := await self._queue.get()) is not None:
                    is_complete = isinstance(item, CallsWaiting)
                    yield item
                    if is_complete:
                        return
                assert self._task is not None
                is_complete = True
                slot.trajectory = trajectory = await self._task
                yield trajectory
        finally:
            self.is_running = False
            if not is_complete and (has_place or self._task is None):
                await self.end()

    async def end(self) -> None:
        """Cancel the trajectory, and wait until its requests to the engine were aborted."""
        if self._task is None:  # it was never started
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _continue(self, results: Mapping[str, str] | None) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(self.request, self._receive))
            self._task.add_done_callback(lambda task: self._queue.put_nowait(None))
        elif not self.calls.deliver(results or {}):
            # Nothing becomes busy, so nothing would report that it is idle again.
            asyncio.get_running_loop().call_soon(self.calls.check_idle)

    def _receive(self, event: Event) -> None:
        if isinstance(event, SpanFinished) and event.span.origin != "prompt":
            self.tokens += event.span.tokens
        self._queue.put_nowait(event)


