"""A trajectory that waits on the server while its client runs tools, over several HTTP requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from sgl_apr.runtime.events import Event, OnEvent, RequestFinished, SpanFinished
from sgl_apr.server.api.admission import AdmissionQueue
from sgl_apr.server.api.openai.reply_stream import ReplyStream
from sgl_apr.server.api.options import CheckedRequest
from sgl_apr.server.api.tools.client_calls import ClientCall, ClientCalls
from sgl_apr.server.api.tools.messages import Message
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
        messages: The messages of the request.
        reply: Splits the text of the trajectory for the responses.
        run: Runs a trajectory, without waiting for a place.
        admission: Gives places.
        owner: Who may continue the trajectory.

    Attributes:
        id: Names the session. It is part of the ids of its calls.
        messages: The messages of the last request. Those of the next one have to begin with them.
        tokens: Tokens of the prompt, and written so far.
        turn_start: The same at the begin of the turn.
        turn_cached_tokens: Tokens that the first request of the turn found in the cache.
        waits_on: Whether the trajectory waits for results, as after a turn that found no place.
        is_running: Whether a request of the client is being answered.
    """

    def __init__(
        self,
        calls: ClientCalls,
        request: CheckedRequest,
        messages: tuple[Message, ...],
        reply: ReplyStream,
        run: Run,
        admission: AdmissionQueue,
        owner: str,
    ) -> None:
        self.id, self.calls, self.request, self.messages = calls.id, calls, request, messages
        self.reply, self.owner = reply, owner
        self.tokens = self.turn_start = len(request.prompt)
        self.turn_cached_tokens = 0
        self._is_first_request = True  # of the turn
        self.is_running = self._is_reported = False
        self._run, self._admission = run, admission
        calls.on_idle = self.report_waiting
        self._queue = asyncio.Queue[Event | CallsWaiting | None]()
        self._task: asyncio.Task[Trajectory] | None = None

    @property
    def waits_on(self) -> bool:
        return self._task is not None and not self._task.done() and bool(self.calls.sent)

    def report_waiting(self) -> None:
        """End the turn: the trajectory only waits for its client. Between turns, the next turn reports it."""
        if self.is_running and not self._is_reported:
            self._is_reported = True
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
        self.is_running, self._is_reported = True, False
        self.turn_start, self.turn_cached_tokens, self._is_first_request = self.tokens, 0, True
        waiting: CallsWaiting | None = None
        has_place = has_ended = False
        try:
            async with self._admission.slot(self.tokens, self.request.options.budget.tokens) as slot:
                has_place = True
                self._continue(results)
                # The event of the prompt waits for the next one, so that a request that the engine refuses fails first.
                held, is_held = list[Event](), results is None
                while not isinstance(item := await self._queue.get(), CallsWaiting | None):
                    held.append(item)
                    if not is_held:
                        for event in held:
                            yield event
                        held.clear()
                    is_held = False
                waiting = item
                if waiting is None:
                    assert self._task is not None
                    has_ended = True
                    slot.trajectory = trajectory = await self._task
        finally:
            self.is_running = False
            if waiting is None and not has_ended and has_place:
                await self.end()
        # The place is free, and the next turn may begin before this generator is closed.
        yield trajectory if waiting is None else waiting

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
        if isinstance(event, RequestFinished) and self._is_first_request:
            self._is_first_request = False
            self.turn_cached_tokens = event.call.cached_tokens or 0
        self._queue.put_nowait(event)
