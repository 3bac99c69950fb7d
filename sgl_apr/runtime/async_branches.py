"""Branches that run while their sequence goes on: async_branches one at a time, and waited for where it asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sgl_apr.engine.base import Engine
from sgl_apr.formats.segmenter import Outline
from sgl_apr.runtime.branches import Branches
from sgl_apr.runtime.events import Forked, Joined
from sgl_apr.runtime.message_join import write_results
from sgl_apr.runtime.sequence import PendingBranch, PendingBranches, SequenceState


class AsyncBranches:
    """The asynchronous forks of one trajectory; they run in `tasks`."""

    def __init__(self, branches: Branches, tasks: asyncio.TaskGroup) -> None:
        self.branches, self.tasks = branches, tasks
        self.record, self.grammar = branches.record, branches.grammar
        self._engines = list[Engine]()

    async def spawn(self, engine: Engine | None, sequence: SequenceState, outline: Outline) -> int:
        """Start one branch and go on beside it. Its share is set aside until it is joined."""
        make, returned, allowance = self.branches, self.branches.returned, sequence.allowance
        if not sequence.waiting:
            sequence.blocks, sequence.ahead = sequence.blocks + 1, PendingBranches()
            allowance.blocks -= 1
        ahead = sequence.ahead or PendingBranches()
        engines: Sequence[Engine] = ()
        if engine:
            engines, _ = await make.decoder.fork(engine, sequence, 1)
            self._engines += engines
        share = make.allocator.branch_allowance(
            allowance, self.record.critical_path_to(sequence), make.plan.width
        )
        make.record.emit(
            Forked(
                (*sequence.path, sequence.blocks),
                ((make.number(outline, ahead.forked), outline.text),),
                ahead.forked + 1,
            )
        )
        branch = make.start_branch(
            sequence, ahead.forked, outline, share, (sequence.span_order[-1],), make.scope(sequence)
        )
        ahead.forked += 1
        new = len(branch.context) - (0 if returned else len(sequence.context))
        task = self.tasks.create_task(make.run(engines[0] if engines else None, branch, new))
        one = make.allocator.overhead.branch
        tokens, chain = share.tokens * (1 + returned) + one, share.critical_path_cap * returned + one
        most = min(share.tokens, share.critical_path_cap)
        aside = PendingBranch(branch, task, tokens, chain, branch.allowance.critical_path_cap + one, most)
        allowance.tokens -= aside.tokens
        allowance.critical_path_cap -= aside.closing_tokens
        allowance.calls -= share.calls
        allowance.blocks -= share.blocks
        ahead.running[branch.number] = aside
        return 0

    async def join(self, sequence: SequenceState, number: str) -> int:
        """Wait for one branch (its result comes back), or for all of them (they are put behind the wait)."""
        ahead = sequence.ahead
        if ahead is None:
            return 0
        numbers = [number] if self.branches.returned else list(ahead.running)
        tips, before, block = [*sequence.frontier], len(sequence.context), (*sequence.path, sequence.blocks)
        joined = [ahead.running.pop(n) for n in numbers]
        for aside in joined:
            await aside.task
            sequence.allowance.tokens += aside.tokens
            sequence.allowance.critical_path_cap += aside.closing_tokens
            self.record.merge_branch(sequence, aside.branch)
        branches = [a.branch for a in joined]
        if self.branches.returned:
            write_results(self.record, self.branches.dialect, sequence, branches, joined[0].max_result_tokens)
        else:
            for branch in branches:
                prefix = len(branch.context) - sum(self.record.spans[i].tokens for i in branch.span_order)
                sequence.context += branch.context[prefix:]
                tips += branch.frontier
            sequence.frontier = tuple(tips)
        self.record.emit(Joined(block, tuple(b.path[-1] for b in branches)))
        return len(sequence.context) - before

    async def join_remaining(self, sequence: SequenceState) -> None:
        """Wait for what the sequence never asked for, because it could not any more."""
        while sequence.ahead and sequence.ahead.running:
            number = next(iter(sequence.ahead.running))
            self.record.inject(sequence, "wait", self.grammar.render_rule("wait", number))
            await self.join(sequence, number)

    async def release(self) -> None:
        """Give back the engines that the forks took."""
        for forked in self._engines:
            await forked.release()
