"""The branches of one fork: begun from their shares, run at once or as paced, cut when enough have ended, joined."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from sgl_apr.blocks import outcome
from sgl_apr.dialects import Phase
from sgl_apr.engine.base import Engine
from sgl_apr.errors import BranchFailed, EngineError
from sgl_apr.runtime.decoding import Decoder
from sgl_apr.runtime.events import Delta, Ended, Forked, Joined
from sgl_apr.runtime.joins import enough, seconds
from sgl_apr.runtime.purse import Divider, Purse
from sgl_apr.runtime.record import Strand
from sgl_apr.runtime.results import drop_call, told, write_results
from sgl_apr.runtime.scope import Cut, Scope
from sgl_apr.segments import Outline

Think = Callable[[Engine | None, Strand, Phase, int], Awaitable[None]]
log = logging.getLogger(__name__)


class Branches:
    """Forks and joins of one trajectory. `think` lets a strand go on until it ends."""

    def __init__(self, decoder: Decoder, divider: Divider, think: Think) -> None:
        self.decoder, self.divider, self._think = decoder, divider, think
        self.plan, self.record = decoder.plan, decoder.record
        self.dialect, self.grammar = self.plan.dialect, self.plan.dialect.grammar
        self.returned, self.anew = self.dialect.sees == "message", self.plan.failed == "retry"
        self.kv = self.plan.join == "kv"

    async def fork_and_join(
        self, engine: Engine | None, strand: Strand, outlines: Sequence[Outline], new: int | None = None
    ) -> int:
        """Run one branch per outline, and leave in the strand what comes of them. Returns its new tokens.

        `new` tokens of it are unknown to the engine yet, None: those injected last alone.
        """
        strand.blocks += 1
        strand.purse.blocks -= 1
        block, fork, size = (*strand.path, strand.blocks), strand.order[-1], len(outlines)
        self.record.tell(Forked(block, tuple((self.number(o, k), o.text) for k, o in enumerate(outlines))))
        if self.dialect.drops_calls:
            drop_call(self.record, strand)
        else:
            self.record.inject(strand, "lead", self.grammar.written("lead"))
            new = new if new is None else new + self.record.unknown(strand)
        engines, load = await self.decoder.fork(engine, strand, size, new) if engine else ((), None)
        share = self.divider.share(strand.purse, self.record.reach(strand), size)
        strand.purse.calls -= size * share.calls
        strand.purse.blocks -= size * share.blocks
        scope = self.scope(strand)
        branches = [self.begin(strand, k, o, share, (fork,), scope) for k, o in enumerate(outlines)]
        prefix = 0 if self.returned else len(strand.context)
        try:
            at_once = self.decoder.at_once(strand, size, share.tokens, load)
            await self._run(strand, engines, branches, prefix, at_once)
        finally:
            scope.leave()
            for forked in engines:
                await forked.release()
        for branch in branches:
            self.record.take(strand, branch)
        joined = Joined(block, tuple(b.path[-1] for b in branches))
        if self.returned:
            most = min(share.tokens, share.cap)
            written = write_results(self.record, self.dialect, strand, branches, most)
            self.record.tell(joined)
            return written
        stitched = self.kv and self.decoder.stitches.join(strand, prefix, branches)
        strand.tip = tuple(tip for b in branches for tip in b.tip)
        for branch in branches:
            strand.context += branch.context[prefix:]
        before = len(strand.context)
        self.record.inject(strand, "tail", self.grammar.written("tail"))
        self.record.tell(joined)
        unknown = 0 if stitched else sum(self.record.unknown(branch) for branch in branches)
        return len(strand.context) - before + unknown

    def number(self, outline: Outline, k: int) -> str:
        """The number of branch `k` (from 0) of a fork, as its header has it."""
        return outline.number or str(self.dialect.first + k)

    def scope(self, strand: Strand) -> Scope:
        """How long the branches of a fork may run: they leave its reserve of time to the strand."""
        left, own, now = strand.scope.left(), seconds(self.plan.joins_when), asyncio.get_running_loop().time()
        ends = [(now + left * (1 - self.plan.budget.reserve), strand.scope.limit)] if left is not None else []
        ends += [(now + own, "policy")] if own is not None else []
        deadline, limit = min(ends, default=(None, ""))
        return Scope(strand.scope, deadline, limit)

    def begin(
        self, strand: Strand, k: int, outline: Outline, share: Purse, after: tuple[int, ...], outer: Scope
    ) -> Strand:
        """A branch with its header, or with its message in a context of its own."""
        number, path = self.number(outline, k), (*strand.path, strand.blocks, k + 1)
        sees = (strand.context, strand.tip) if not self.returned else ((), ())
        reach = self.record.reach(strand)
        branch = Strand(
            path, *sees, replace(share), Scope(outer), number=number, outline=outline.text,
            lenient=self.plan.failed == "skip", joined=strand.joined,
        )  # fmt: skip
        if self.returned:  # what it is told comes out of its share
            branch.after = after
            message = told(self.record, self.dialect, strand, outline.text, min(share.tokens, share.cap))
            text = self.plan.wrap(message) if self.plan.wrap else message
        else:
            text = self.grammar.written("header", number)
        self.record.inject(branch, "header", text, label=outline.text)
        if not self.returned:
            branch.purse.tokens, reach = share.tokens, self.record.reach(branch)
        branch.purse.cap, branch.after = reach + share.cap, ()
        return branch

    async def _run(
        self,
        strand: Strand,
        engines: Sequence[Engine],
        branches: Sequence[Strand],
        prefix: int,
        at_once: int,
    ) -> None:
        """Until enough of them have ended; the others are cut where they are."""
        done, ended = enough(self.plan.joins_when, len(branches)), list[Strand]()
        gate = asyncio.Semaphore(at_once)

        async def run(engine: Engine | None, branch: Strand) -> None:
            await think(engine, branch)
            if engine and self.kv:  # while others still run
                await self.decoder.commit(engine, strand, branch)

        async def think(engine: Engine | None, branch: Strand) -> None:
            try:
                await branch.scope.within(gate.acquire())
            except Cut:
                await self.run(engine, branch, 0)  # it closes what is open
                return
            try:
                await self.run(engine, branch, len(branch.context) - prefix)
            finally:
                gate.release()
            ended.append(branch)
            if len(ended) < len(branches) and done([self.record.branch(b) for b in ended]):
                for other in branches:
                    if other not in ended:
                        other.scope.stop("aborted", "policy")

        try:
            async with asyncio.TaskGroup() as group:
                for k, branch in enumerate(branches):
                    group.create_task(run(engines[k] if engines else None, branch))
        except BaseExceptionGroup as failed:  # the group has cancelled and awaited the others
            raise first(failed) from first(failed).__cause__

    async def run(self, engine: Engine | None, branch: Strand, new: int) -> None:
        """One branch to its end. Where it fails for good it begins anew once, or raises `BranchFailed`."""
        begun = replace(branch, order=[*branch.order], purse=replace(branch.purse)) if self.anew else None
        try:
            await self._think(engine, branch, "branch", new)
        except EngineError as error:
            if begun is None and isinstance(error, BranchFailed):  # of its own branches
                raise
            if begun is None:
                raise BranchFailed(f"branch {branch.name}: {error}", branch.path, error.status) from error
            log.warning("%s: branch %s failed, and begins anew: %s", self.decoder.rid, branch.name, error)
            self.record.void(branch, None)
            calls = branch.purse.calls
            for field in ("context", "tip", "order", "purse", "blocks", "spent", "joined"):
                setattr(branch, field, getattr(begun, field))
            branch.purse.calls, branch.lenient = calls, True
            self.record.tell(Delta(branch.path, self.record.of(branch)[0].text))
            await self._think(engine, branch, "branch", new)
        branch.scope.leave()
        self.record.tell(Ended(branch.path, outcome(self.record.finish_of(branch)) or "ok"))


def first(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """What failed first; a group cancels and awaits its other tasks before it raises."""
    error = failed.exceptions[0]
    return first(error) if isinstance(error, BaseExceptionGroup) else error
