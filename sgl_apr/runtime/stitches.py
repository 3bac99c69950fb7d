"""Joins in the KV cache: branches are committed and joined, brought back when the cache has lost them, or read as text."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from sgl_apr.engine.base import Engine, Request
from sgl_apr.errors import EngineError
from sgl_apr.layout import commits, join
from sgl_apr.runtime.purse import Purse
from sgl_apr.runtime.record import Record, Strand

T = TypeVar("T")
LOST = 409  # the status of a request whose layout needs what is not cached (any more)
log = logging.getLogger(__name__)


class Stitches:
    """Those of one trajectory. `new_rid` makes request ids."""

    def __init__(self, record: Record, new_rid: Callable[[], str]) -> None:
        self.record, self.new_rid = record, new_rid

    def join(self, strand: Strand, fork: int, branches: Sequence[Strand]) -> bool:
        """Join committed branches of a strand, forked at `fork` tokens; False if they have to be read as text."""
        why = next((f"branch {b.name} was not committed" for b in branches if not b.committed), "")
        joined = join(strand.joined, fork, [(b.joined, len(b.context)) for b in branches])
        if not why and joined is None:
            why = "a branch has read as text what was joined before the fork"
        self.record.join((*strand.path, strand.blocks), why)
        strand.joined = strand.joined if why or joined is None else joined
        return not why

    async def send(
        self,
        engine: Engine,
        strand: Strand,
        purse: Purse,
        request: Request,
        send: Callable[[Request], Awaitable[T]],
    ) -> T:
        """What `send` returns for a request with the layout of `strand`, whatever the cache has lost of it.

        What is lost is committed again, once; if that does not help, the strand is read as text from now on.
        Further calls are taken from `purse`.
        """

        async def once() -> T:
            return await send(replace(request, rid=self.new_rid(), layout=strand.layout))

        try:
            return await once()
        except EngineError as error:
            if error.status != LOST or not strand.joined:
                raise
            lost = error
        if await self._bring_back(engine, strand, purse, request):
            try:
                return await once()
            except EngineError as error:
                if error.status != LOST:
                    raise
                lost = error
        if purse.calls < 1:
            raise lost
        log.info("%s is read as text: %s", request.rid, lost)
        self.record.give_up(strand, str(lost))
        purse.calls -= 1
        return await once()

    async def _bring_back(self, engine: Engine, strand: Strand, purse: Purse, request: Request) -> bool:
        """Commit all that a strand has joined; False if that cannot be done."""
        wanted = list(commits(strand.layout or ()))
        if purse.calls < len(wanted) + 2:  # this one again, and once more as text
            return False
        purse.calls -= len(wanted) + 1
        for ranges, layout in wanted:
            ids = tuple(i for first, last in ranges for i in strand.context[first:last])
            started = time.monotonic()
            again = Request(self.new_rid(), ids, layout=layout, fields=request.fields)
            try:
                result = await engine.commit(again)
            except EngineError as error:
                if error.status != LOST:
                    raise
                return False
            self.record.call("recommit", strand.path, result, 0, started, None, 0)
        return True
