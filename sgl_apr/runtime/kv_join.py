"""Joins in the KV cache: branches are committed and joined, recommitted when the cache has lost them, or read as text."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from sgl_apr.engine.base import Engine, Request
from sgl_apr.engine.sglang_names import CACHE_MISS_STATUS
from sgl_apr.errors import EngineError
from sgl_apr.runtime.allowance import Allowance
from sgl_apr.runtime.request_log import RequestLog
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.join_layout import Layout, commit_prompts, extend_layout, join_branches

T = TypeVar("T")
log = logging.getLogger(__name__)


class KvJoiner:
    """The joins of one trajectory.

    Args:
        request_log: Records the joins, and requests that commit a branch again.
        new_rid: Makes request ids.
    """

    def __init__(self, request_log: RequestLog, new_rid: Callable[[], str]) -> None:
        self.request_log, self.new_rid = request_log, new_rid
        self._sent_rids: set[str] = set()

    def join(self, sequence: SequenceState, fork: int, branches: Sequence[SequenceState]) -> bool:
        """Join committed branches of a sequence that forked at token `fork`.

        Returns:
            Whether they are joined in the cache. Otherwise they have to be read as text.
        """
        why = next((f"branch {b.identity} was not committed" for b in branches if not b.committed), "")
        joined = join_branches(sequence.kv_layout, fork, [(b.kv_layout, len(b.context)) for b in branches])
        if not why and joined is None:
            why = "a branch has read as text what was joined before the fork"
        self.request_log.record_join((*sequence.path, sequence.blocks), why)
        if not why and joined is not None:
            sequence.kv_layout = joined
        return not why

    async def send(
        self,
        engine: Engine,
        sequence: SequenceState,
        allowance: Allowance,
        request: Request,
        send: Callable[[Request], Awaitable[T]],
    ) -> T:
        """Send a request with the layout of `sequence`, also if the cache has lost parts of it.

        Lost parts are committed again, once. If that does not help, the sequence is read as text from now on.

        Args:
            engine: The engine that commits.
            sequence: The sequence that the request belongs to.
            allowance: Pays for further calls.
            request: The request, without layout.
            send: Sends it.
        """

        async def attempt() -> T:
            # A request that continues another has more ids than its sequence.
            layout = extend_layout(sequence.kv_layout, len(request.input_ids))
            return await send(self._unsent(request, layout))

        try:
            return await attempt()
        except EngineError as error:
            if error.status != CACHE_MISS_STATUS or not sequence.kv_layout:
                raise
            miss = error
        if await self._recommit_lost(engine, sequence, allowance, request):
            try:
                return await attempt()
            except EngineError as error:
                if error.status != CACHE_MISS_STATUS:
                    raise
                miss = error
        if allowance.calls < 1:
            raise miss
        log.info("%s is read as text: %s", request.rid, miss)
        self.request_log.record_join(sequence.path, str(miss))
        sequence.kv_layout = ()
        allowance.spend(calls=1)
        return await attempt()

    def _unsent(self, request: Request, layout: Layout | None) -> Request:
        """The request with a layout, and with an id under which nothing was sent yet."""
        if request.rid in self._sent_rids or layout is not None:
            request = replace(request, rid=self.new_rid(), layout=layout)
        self._sent_rids.add(request.rid)
        return request

    async def _recommit_lost(
        self, engine: Engine, sequence: SequenceState, allowance: Allowance, request: Request
    ) -> bool:
        """Commit all that a sequence has joined. False if that cannot be done."""
        prompts = list(commit_prompts(sequence.layout or ()))
        if allowance.calls < len(prompts) + 2:  # this request again, and once more as text
            return False
        allowance.spend(calls=len(prompts) + 1)
        for ranges, layout in prompts:
            ids = tuple(i for start, end in ranges for i in sequence.context[start:end])
            started = time.monotonic()
            commit = Request(self.new_rid(), ids, layout=layout, fields=request.fields)
            try:
                result = await engine.commit(commit)
            except EngineError as error:
                if error.status != CACHE_MISS_STATUS:
                    raise
                return False
            self.request_log.record_request("recommit", sequence.path, result, 0, started, None, 0)
        return True
