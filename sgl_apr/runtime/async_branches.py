"""Branches that run while their sequence continues: started one at a time, and joined where it waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.formats.segmenter import Outline
from sgl_apr.runtime.branch_group import BranchGroup
from sgl_apr.runtime.fork_join import ForkJoin
from sgl_apr.runtime.fork_rules import ForkRules
from sgl_apr.runtime.request_runner import RequestRunner, release_engines
from sgl_apr.runtime.sequence import PendingBranch, PendingBranches, SequenceState

RunBranchOn = Callable[[Engine | None, BranchGroup, SequenceState], Coroutine[Any, Any, None]]


class AsyncBranches:
    """The asynchronous forks of one trajectory. Branches run in `tasks`."""

    def __init__(
        self, runner: RequestRunner, rules: ForkRules, fork_join: ForkJoin, tasks: asyncio.TaskGroup
    ) -> None:
        self.runner, self.rules, self.fork_join, self.tasks = runner, rules, fork_join, tasks
        self.options = rules.options
        self._groups = dict[SequenceState, BranchGroup]()  # the open block of each sequence
        self._engines = list[Engine]()

    async def spawn(
        self, engine: Engine | None, sequence: SequenceState, outline: Outline, run_branch: RunBranchOn
    ) -> int:
        """Start one branch and continue. Its share is set aside until it is joined.

        Returns:
            Tokens of the sequence that the engine has not computed: none.
        """
        if sequence.pending is None or not sequence.pending.running:
            sequence.pending, self._groups[sequence] = PendingBranches(), BranchGroup(sequence)
        group, pending = self._groups[sequence], sequence.pending
        engines: Sequence[Engine] = ()
        if engine:
            engines, _ = await self.runner.fork(engine, sequence, 1)
            self._engines += engines
        share = self.rules.branch_allowance(sequence, self.options.width)
        (identity,) = self.fork_join.announce(group, [outline])
        branch = self.fork_join.start(group, identity, share, self.fork_join.scope(sequence))
        task = self.tasks.create_task(run_branch(engines[0] if engines else None, group, branch))
        by_message, overhead = self.rules.by_message, self.rules.overhead.branch
        reserved = PendingBranch(
            branch,
            task,
            tokens=share.tokens * (1 + by_message) + overhead,
            closing_tokens=share.critical_path_cap * by_message + overhead,
            latest_end=branch.allowance.critical_path_cap + overhead,
            max_result_tokens=min(share.tokens, share.critical_path_cap),
        )
        sequence.set_aside(share, 1)
        sequence.reserve(reserved)
        pending.started += 1
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
        numbers = [number] if self.rules.by_message else list(pending.running)
        joined = [pending.running.pop(n) for n in numbers]
        for one in joined:
            await one.task
            sequence.release(one)
            sequence.merge(one.branch)
        branches = [one.branch for one in joined]
        if self.rules.by_message:
            self.fork_join.write_results(sequence, branches, joined[0].max_result_tokens)
        else:
            sequence.append_branches(branches, after_frontier=True)
        self._groups[sequence].joined(branches)
        return len(sequence.context) - before

    async def join_remaining(self, sequence: SequenceState) -> None:
        """Wait for the branches that a sequence has not waited for when it ends."""
        while sequence.pending and sequence.pending.running:
            number = next(iter(sequence.pending.running))
            sequence.inject("wait", self.fork_join.grammar.render_rule("wait", number))
            await self.join(sequence, number)

    async def release(self) -> None:
        """Release the engines of all forks."""
        await release_engines(self._engines)
