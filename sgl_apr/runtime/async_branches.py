"""Branches that run while their sequence continues: started one at a time, and joined where it waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.formats.segmenter import Outline
from sgl_apr.runtime.allocation import BudgetAllocator
from sgl_apr.runtime.branch_group import BranchGroup
from sgl_apr.runtime.branches import BranchStarter
from sgl_apr.runtime.decoder import RequestRunner
from sgl_apr.runtime.message_join import write_results
from sgl_apr.runtime.sequence import PendingBranch, PendingBranches, SequenceState

RunBranchOn = Callable[[Engine | None, BranchGroup, SequenceState], Coroutine[Any, Any, None]]


class AsyncBranches:
    """The asynchronous forks of one trajectory. Branches run in `tasks`."""

    def __init__(
        self,
        runner: RequestRunner,
        allocator: BudgetAllocator,
        starter: BranchStarter,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.runner, self.allocator, self.starter, self.tasks = runner, allocator, starter, tasks
        self.dialect, self.options = starter.dialect, starter.options
        self._engines = list[Engine]()

    async def spawn(
        self, engine: Engine | None, sequence: SequenceState, outline: Outline, run_branch: RunBranchOn
    ) -> int:
        """Start one branch and continue. Its share is set aside until it is joined.

        Returns:
            Tokens of the sequence that the engine has not computed: none.
        """
        if not sequence.pending_count:
            group = BranchGroup(sequence.next_block(), self.runner.events)
            sequence.pending = PendingBranches(group)
            sequence.allowance.spend(blocks=1)
        pending = sequence.pending
        assert pending is not None
        group = pending.group
        engines: Sequence[Engine] = ()
        if engine:
            engines, _ = await self.runner.fork(engine, sequence, 1)
            self._engines += engines
        by_message, overhead = self.allocator.joins_by_message, self.allocator.overhead.branch
        share = self.allocator.branch_allowance(
            sequence.allowance, sequence.critical_path, self.options.width
        )
        (identity,) = self.starter.identities(group.block, [outline], len(group.branches))
        group.announce([identity])
        fork_span = sequence.span_order[-1]
        branch = self.starter.start(sequence, identity, share, self.starter.scope(sequence), fork_span)
        group.branches.append(branch)
        task = self.tasks.create_task(run_branch(engines[0] if engines else None, group, branch))
        reserved = PendingBranch(
            branch,
            task,
            tokens=share.tokens * (1 + by_message) + overhead,
            closing_tokens=share.critical_path_cap * by_message + overhead,
            latest_end=branch.allowance.critical_path_cap + overhead,
            max_result_tokens=min(share.tokens, share.critical_path_cap),
        )
        sequence.allowance.spend(
            reserved.tokens, critical_path=reserved.closing_tokens, calls=share.calls, blocks=share.blocks
        )
        pending.running[identity.number] = reserved
        return 0

    async def join(self, sequence: SequenceState, number: str) -> int:
        """Wait for one branch, whose result comes back, or for all, whose text follows the wait.

        Returns:
            The number of new tokens.
        """
        pending, before = sequence.pending, len(sequence.context)
        if pending is None:
            return 0
        by_message = self.allocator.joins_by_message
        numbers = [number] if by_message else list(pending.running)
        joined = [pending.running.pop(n) for n in numbers]
        for one in joined:
            await one.task
            sequence.allowance.refund(one.tokens, critical_path=one.closing_tokens)
            sequence.merge(one.branch)
        branches = [one.branch for one in joined]
        if by_message:
            write_results(self.dialect, sequence, branches, joined[0].max_result_tokens)
        else:
            sequence.append_branches(branches, after_frontier=True)
        pending.group.joined(branches)
        return len(sequence.context) - before

    async def join_remaining(self, sequence: SequenceState) -> None:
        """Wait for the branches that a sequence has not waited for when it ends."""
        while sequence.pending and sequence.pending.running:
            number = next(iter(sequence.pending.running))
            sequence.inject("wait", self.dialect.grammar.render_rule("wait", number))
            await self.join(sequence, number)

    async def release(self) -> None:
        """Release the engines of all forks."""
        for engine in self._engines:
            await engine.release()
