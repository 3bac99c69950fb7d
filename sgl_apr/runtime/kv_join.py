"""Joins in the KV cache: branches are committed and joined, brought back when the cache has lost them, or read as text."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from sgl_apr.engine.base import Engine, Request
from sgl_apr.errors import EngineError
from sgl_apr.runtime.allocation import Allowance
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.join_layout import commit_prompts, join

T = TypeVar("T")
CACHE_MISS_STATUS = 409  # the status of a request whose layout needs what is not cached (any more)
log = logging.getLogger(__name__)


class KvJoiner:
    """Those of one trajectory. `new_rid` makes request ids."""

    def __init__(self, record: TrajectoryRecorder, new_rid: Callable[[], str]) -> None:
        self.record, self.new_rid = record, new_rid

    def join(self, sequence: SequenceState, fork: int, branches: Sequence[SequenceState]) -> bool:
        """Join committed branches of a sequence, forked at `fork` tokens; False if they have to be read as text."""
        why = next((f"branch {b.name} was not committed" for b in branches if not b.committed), "")
        joined = join(sequence.kv_layout, fork, [(b.kv_layout, len(b.context)) for b in branches])
        if not why and joined is None:
            why = "a branch has read as text what was joined before the fork"
        self.record.record_join((*sequence.path, sequence.blocks), why)
        sequence.kv_layout = sequence.kv_layout if why or joined is None else joined
        return not why

    async def send(
        self,
        engine: Engine,
        sequence: SequenceState,
        allowance: Allowance,
        request: Request,
        send: Callable[[Request], Awaitable[T]],
    ) -> T:
        """What `send` returns for a request with the layout of `sequence`, whatever the cache has lost of it.

        What is lost is committed again, once; if that does not help, the sequence is read as text from now on.
        Further calls are taken from `allowance`.
        """

        async def once() -> T:
            return await send(replace(request, rid=self.new_rid(), layout=sequence.layout))

        try:
            return await once()
        except EngineError as error:
            if error.status != CACHE_MISS_STATUS or not sequence.kv_layout:
                raise
            lost = error
        if await self._recommit_lost(engine, sequence, allowance, request):
            try:
                return await once()
            except EngineError as error:
                if error.status != CACHE_MISS_STATUS:
                    raise
                lost = error
        if allowance.calls < 1:
            raise lost
        log.info("%s is read as text: %s", request.rid, lost)
        self.record.fall_back_to_text(sequence, str(lost))
        allowance.calls -= 1
        return await once()

    async def _recommit_lost(
        self, engine: Engine, sequence: SequenceState, allowance: Allowance, request: Request
    ) -> bool:
        """Commit all that a sequence has joined; False if that cannot be done."""
        wanted = list(commit_prompts(sequence.layout or ()))
        if allowance.calls < len(wanted) + 2:  # this one again, and once more as text
            return False
        allowance.calls -= len(wanted) + 1
        for ranges, layout in wanted:
            ids = tuple(i for first, last in ranges for i in sequence.context[first:last])
            started = time.monotonic()
            again = Request(self.new_rid(), ids, layout=layout, fields=request.fields)
            try:
                result = await engine.commit(again)
            except EngineError as error:
                if error.status != CACHE_MISS_STATUS:
                    raise
                return False
            self.record.record_request("recommit", sequence.path, result, 0, started, None, 0)
        return True
