"""Branches that run while their strand goes on: spawned one at a time, and waited for where it asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sgl_apr.engine.base import Engine
from sgl_apr.runtime.branches import Branches
from sgl_apr.runtime.events import Forked, Joined
from sgl_apr.runtime.record import Ahead, Aside, Strand
from sgl_apr.runtime.results import write_results
from sgl_apr.segments import Outline


class Spawned:
    """The asynchronous forks of one trajectory; they run in `tasks`."""

    def __init__(self, branches: Branches, tasks: asyncio.TaskGroup) -> None:
        self.branches, self.tasks = branches, tasks
        self.record, self.grammar = branches.record, branches.grammar
        self._engines = list[Engine]()

    async def spawn(self, engine: Engine | None, strand: Strand, outline: Outline) -> int:
        """Start one branch and go on beside it. Its share is set aside until it is joined."""
        make, returned, purse = self.branches, self.branches.returned, strand.purse
        if not strand.waiting:
            strand.blocks, strand.ahead = strand.blocks + 1, Ahead()
            purse.blocks -= 1
        ahead = strand.ahead or Ahead()
        engines: Sequence[Engine] = ()
        if engine:
            engines, _ = await make.decoder.fork(engine, strand, 1)
            self._engines += engines
        share = make.divider.share(purse, self.record.reach(strand), make.plan.width)
        make.record.tell(
            Forked(
                (*strand.path, strand.blocks),
                ((make.number(outline, ahead.forked), outline.text),),
                ahead.forked + 1,
            )
        )
        branch = make.begin(strand, ahead.forked, outline, share, (strand.order[-1],), make.scope(strand))
        ahead.forked += 1
        new = len(branch.context) - (0 if returned else len(strand.context))
        task = self.tasks.create_task(make.run(engines[0] if engines else None, branch, new))
        one = make.divider.overhead.branch
        tokens, chain = share.tokens * (1 + returned) + one, share.cap * returned + one
        most = min(share.tokens, share.cap)
        aside = Aside(branch, task, tokens, chain, branch.purse.cap + one, most)
        purse.tokens -= aside.tokens
        purse.cap -= aside.chain
        purse.calls -= share.calls
        purse.blocks -= share.blocks
        ahead.running[branch.number] = aside
        return 0

    async def join(self, strand: Strand, number: str) -> int:
        """Wait for one branch (its result comes back), or for all of them (they are put behind the wait)."""
        ahead = strand.ahead
        if ahead is None:
            return 0
        numbers = [number] if self.branches.returned else list(ahead.running)
        tips, before, block = [*strand.tip], len(strand.context), (*strand.path, strand.blocks)
        joined = [ahead.running.pop(n) for n in numbers]
        for aside in joined:
            await aside.task
            strand.purse.tokens += aside.tokens
            strand.purse.cap += aside.chain
            self.record.take(strand, aside.branch)
        branches = [a.branch for a in joined]
        if self.branches.returned:
            write_results(self.record, self.branches.dialect, strand, branches, joined[0].most)
        else:
            for branch in branches:
                prefix = len(branch.context) - sum(self.record.spans[i].tokens for i in branch.order)
                strand.context += branch.context[prefix:]
                tips += branch.tip
            strand.tip = tuple(tips)
        self.record.tell(Joined(block, tuple(b.path[-1] for b in branches)))
        return len(strand.context) - before

    async def join_rest(self, strand: Strand) -> None:
        """Wait for what the strand never asked for, because it could not any more."""
        while strand.ahead and strand.ahead.running:
            number = next(iter(strand.ahead.running))
            self.record.inject(strand, "wait", self.grammar.written("wait", number))
            await self.join(strand, number)

    async def release(self) -> None:
        """Give back the engines that the forks took."""
        for forked in self._engines:
            await forked.release()
