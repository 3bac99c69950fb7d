"""Branches that run while their sequence continues: started one at a time, and joined where it waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.formats.segmenter import Outline
from sgl_apr.runtime.allowance import NO_LIMIT
from sgl_apr.runtime.branch_group import BranchGroup
from sgl_apr.runtime.engine_cleanup import release_engines
from sgl_apr.runtime.fork_join import ForkJoin
from sgl_apr.runtime.fork_rules import ForkRules
from sgl_apr.runtime.lease_pool import Lease
from sgl_apr.runtime.pending_leases import PendingLeases
from sgl_apr.runtime.request_runner import RequestRunner
from sgl_apr.runtime.sequence import PendingBranch, PendingBranches, SequenceState

RunBranchOn = Callable[[Engine | None, BranchGroup, SequenceState], Coroutine[Any, Any, None]]


class AsyncBranches:
    """The asynchronous forks of one trajectory. Branches run in `tasks`."""

    def __init__(
        self, runner: RequestRunner, rules: ForkRules, fork_join: ForkJoin, tasks: asyncio.TaskGroup
    ) -> None:
        self.runner, self.rules, self.fork_join, self.tasks = runner, rules, fork_join, tasks
        self.options = rules.options
        self._groups = dict[
            SequenceState, tuple[BranchGroup, PendingLeases]
        ]()  # the open block of each sequence
        self._engines: list[Engine] = []

    async def spawn(
        self,
        engine: Engine | None,
        sequence: SequenceState,
        outline: Outline,
        run_branch: RunBranchOn,
        outer: BranchGroup | None,
    ) -> int:
        """Start one branch and continue. Its lease is set aside until it is joined.

        Args:
            engine: The engine of the sequence, None if it may send nothing.
            sequence: The sequence that continues.
            outline: What the branch is to do.
            run_branch: Runs it.
            outer: The group that the sequence is a branch of.

        Returns:
            Tokens of the sequence that the engine has not computed.
        """
        pending = sequence.pending
        if pending is None or not pending.running:
            tokens = sequence.allowance.tokens
            kept = tokens - self.rules.unreserved(sequence, tokens)
            pending = sequence.pending = PendingBranches(kept)
            self._groups[sequence] = self._open_group(sequence, outer)
        group, leases = self._groups[sequence]
        engines: Sequence[Engine] = ()
        if engine:
            engines, _ = await self.runner.fork(engine, sequence, 1)
            self._engines += engines
        share = self.rules.branch_allowance(sequence, self.options.width)
        (identity,) = self.fork_join.announce(group, [outline])
        branch = self.fork_join.start(group, identity, share, self.fork_join.scope(sequence))
        by_message, overhead = self.rules.by_message, self.rules.overhead.branch
        lease = Lease(
            share.tokens,
            self.options.budget.branch_tokens or NO_LIMIT,
            share.tokens * by_message,
            started=True,
        )
        leases.add(branch, lease)

        async def run() -> None:
            await run_branch(engines[0] if engines else None, group, branch)
            leases.end(branch)

        reserved = PendingBranch(
            branch,
            self.tasks.create_task(run()),
            tokens=lease.committed(overhead),
            closing_tokens=share.critical_path_cap * by_message + overhead,
            latest_end=branch.allowance.critical_path_cap + overhead,
            max_path_tokens=share.critical_path_cap,
        )
        sequence.set_aside(share, 1)
        sequence.reserve(reserved)
        pending.started += 1
        pending.running[identity.number] = reserved
        return sequence.uncommitted_tokens

    async def join(self, sequence: SequenceState, number: str) -> int:
        """Wait for one branch, whose result comes back, or for all, whose text follows the wait.

        Returns:
            The number of new tokens.
        """
        pending, before = sequence.pending, len(sequence.context)
        if pending is None:
            return 0
        group, leases = self._groups[sequence]
        numbers = [number] if self.rules.by_message else list(pending.running)
        while not await leases.wait_for([pending.running[n].branch for n in numbers]):
            await self._lease_again(sequence, pending)
        joined = [pending.running.pop(n) for n in numbers]
        for one in joined:
            await one.task
            sequence.release(one)
            sequence.merge(one.branch)
        branches = [one.branch for one in joined]
        if self.rules.by_message:
            max_tokens = [min(leases.of(one.branch).result_tokens, one.max_path_tokens) for one in joined]
            self.fork_join.write_results(sequence, branches, max_tokens)
        else:
            sequence.append_branches(branches, after_frontier=True)
        for branch in branches:
            sequence.record_branch(branch, leases.of(branch).committed(0))
            leases.remove(branch)
        group.joined(branches)
        return len(sequence.context) - before

    async def join_remaining(self, sequence: SequenceState) -> None:
        """Wait for the branches that a sequence has not waited for when it ends."""
        while sequence.pending and sequence.pending.running:
            number = next(iter(sequence.pending.running))
            sequence.inject("wait", self.fork_join.grammar.render_rule("wait", number))
            await self.join(sequence, number)

    def _open_group(
        self, sequence: SequenceState, outer: BranchGroup | None
    ) -> tuple[BranchGroup, PendingLeases]:
        def final_tokens(branch: SequenceState, lease: Lease) -> int:
            max_tokens = min(lease.result_tokens, self._pending(sequence, branch).max_path_tokens)
            return self.fork_join.final_tokens(branch, max_tokens)

        group = BranchGroup(sequence, outer)
        leases = PendingLeases(
            self.rules.overhead.branch, results=self.rules.by_message, final_tokens=final_tokens
        )
        if self.rules.shares_tokens:
            group.leases = leases
        return group, leases

    @staticmethod
    def _pending(sequence: SequenceState, branch: SequenceState) -> PendingBranch:
        running = sequence.pending.running if sequence.pending else {}
        return running[branch.identity.number]

    async def _lease_again(self, sequence: SequenceState, pending: PendingBranches) -> None:
        """Lease what is left to branches that wait, while their sequence waits for them too.

        The sequence keeps what it kept of its tokens when the first branch started, and what closes its text. A branch
        asks for more itself before it refuses its own branches.
        """
        group, leases = self._groups[sequence]
        self._reserve_anew(sequence, pending)
        closing = self.rules.overhead.of(sequence.pending_count)
        if not leases.lease_again(sequence.allowance.tokens - pending.kept_tokens - closing):
            more = 0
            if group.outer and group.outer.leases:
                returned = self.fork_join.decoded_result_tokens(sequence, ())
                more = await sequence.scope.run(group.outer.extend(sequence, returned))
            if not more or not leases.lease_again(self.rules.unreserved(sequence, more)):
                leases.refuse()
        self._reserve_anew(sequence, pending)

    def _reserve_anew(self, sequence: SequenceState, pending: PendingBranches) -> None:
        """Set aside for every branch what its lease has come to."""
        _, leases = self._groups[sequence]
        for number, one in pending.running.items():
            tokens = leases.of(one.branch).committed(self.rules.overhead.branch)
            sequence.release(one)
            pending.running[number] = replace(one, tokens=tokens)
            sequence.reserve(pending.running[number])

    async def release(self) -> None:
        """Release the engines of all forks."""
        await release_engines(self._engines)
