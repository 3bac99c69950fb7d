"""The branches of one block: started, run in parallel as paced, cut when a policy has enough, and merged."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from sgl_apr.runtime.allowance import Allowance
from sgl_apr.runtime.cancel_scope import CancelScope, ScopeCancelled
from sgl_apr.runtime.events import BranchEnded, Forked, Joined
from sgl_apr.runtime.join_policy import Policy, required_branches
from sgl_apr.runtime.leases import BranchLeases, Slots
from sgl_apr.runtime.pending_leases import PendingLeases
from sgl_apr.runtime.sequence import BranchIdentity, SequenceState
from sgl_apr.trajectory.blocks import branch_outcome

T = TypeVar("T")
RunBranch = Callable[[SequenceState], Awaitable[None]]


class BranchGroup:
    """The branches of the next block of `parent`.

    Attributes:
        parent: The sequence that forks.
        outer: The group of the parent, if it is a branch.
        leases: The leases of the branches, if they share their tokens.
        block: The path of the block.
        branches: Those started so far, in order.
    """

    def __init__(self, parent: SequenceState, outer: BranchGroup | None = None) -> None:
        self.parent, self.outer, self.block = parent, outer, parent.open_block()
        self.branches: list[SequenceState] = []
        self.leases: BranchLeases | PendingLeases | None = None
        self._slots: Slots | None = None
        self._events = parent.graph.events
        self._fork_span = parent.span_order[-1] if parent.span_order else None

    def announce(self, labels: Sequence[tuple[str, str]]) -> list[BranchIdentity]:
        """Name the next branches and emit that they are forked, before anything of theirs.

        Args:
            labels: Number and outline of each.
        """
        first = len(self.branches) + 1
        if self._events.listening:
            self._events.emit(Forked(self.block, tuple(labels), first))
        return [BranchIdentity((*self.block, k), *label) for k, label in enumerate(labels, first)]

    def start(
        self,
        identity: BranchIdentity,
        allowance: Allowance,
        scope: CancelScope,
        *,
        context: tuple[int, ...] | None = None,
        frontier: tuple[int, ...] = (),
        tolerate_failure: bool = True,
    ) -> SequenceState:
        """Start a branch, without a header yet.

        Args:
            identity: From `announce`.
            allowance: What it may spend.
            scope: Until when the branches of the fork may run.
            context: The token ids that it begins with. None for all of its parent's.
            frontier: The spans that a context of its own follows.
            tolerate_failure: A failing engine ends it with a note, and raises nothing.
        """
        if context is None:
            context, frontier = self.parent.context, self.parent.frontier
        branch = SequenceState(
            identity,
            self.parent.graph,
            context,
            frontier,
            allowance,
            CancelScope(scope),
            prefix_tokens=len(context),
            tolerate_failure=tolerate_failure,
            kv_layout=self.parent.kv_layout,
            usage=self.parent.usage,
            first_usage=self.parent.usage,
        )
        self.branches.append(branch)
        return branch

    def start_with_header(
        self,
        identity: BranchIdentity,
        share: Allowance,
        scope: CancelScope,
        header: str,
        *,
        tolerate_failure: bool,
    ) -> SequenceState:
        """Start a branch that continues its parent's context with a header. The header was set aside.

        Args:
            identity: From `announce`.
            share: What it may spend; its critical path counts from the end of the header.
            scope: Until when the branches of the fork may run.
            header: The text of the header.
            tolerate_failure: As in `start`.
        """
        branch = self.start(identity, share, scope, tolerate_failure=tolerate_failure)
        branch.inject("header", header, identity.outline, charged=False)
        branch.allowance = share.starting_at(branch.critical_path)
        return branch

    def start_with_prompt(
        self,
        identity: BranchIdentity,
        share: Allowance,
        scope: CancelScope,
        prompt: str,
        *,
        token_ids: Sequence[int] | None = None,
        tolerate_failure: bool,
    ) -> SequenceState:
        """Start a branch with a prompt in a context of its own, which it pays for. Arguments as in `start_with_header`."""
        allowance = share.starting_at(self.parent.critical_path)
        branch = self.start(identity, allowance, scope, context=(), tolerate_failure=tolerate_failure)
        waits_for = () if self._fork_span is None else (self._fork_span,)
        branch.inject("header", prompt, identity.outline, waits_for=waits_for, token_ids=token_ids)
        return branch

    async def run(
        self,
        run_branch: RunBranch,
        *,
        policy: Policy = "all",
        parallelism: int | None = None,
        after_branch: RunBranch | None = None,
    ) -> None:
        """Run all branches until `policy` has enough of them. The others are cut where they are, and close.

        Args:
            run_branch: Runs one branch to its end. It only closes a branch whose scope is cancelled.
            policy: When the join happens.
            parallelism: How many run at once, None for all.
            after_branch: Called for each branch that has ended, while others still run.

        Raises:
            BaseException: What a branch raised first. The others are cancelled and awaited before.
        """
        slots = self._slots = Slots(parallelism or max(1, len(self.branches)))
        ended: list[SequenceState] = []
        joins = asyncio.Event()

        def is_enough() -> bool:
            if callable(policy):
                return policy([branch.as_branch() for branch in ended])
            return len(ended) >= required_branches(policy, len(self.branches))

        async def run_one(branch: SequenceState) -> None:
            try:
                if self.leases and not self.leases.of(branch).started:
                    await branch.scope.run(self.leases.start(branch))
                if slots.is_free_for(branch) and branch.scope.is_unlimited:
                    await slots.acquire(branch)  # it does not wait, so nothing has to cut it
                else:
                    await branch.scope.run(slots.acquire(branch))
            except ScopeCancelled:
                await run_branch(branch)
                self._end_lease(branch)
                return
            try:
                await run_branch(branch)
            finally:
                slots.release(branch)
            self._end_lease(branch)
            if branch.finish == "failed":  # it counts for no policy
                return
            ended.append(branch)
            others = [b for b in self.branches if b not in ended]
            if others and not joins.is_set() and is_enough():
                joins.set()
                for other in others:
                    other.scope.cancel("aborted", "policy")

        async def run_and_follow(branch: SequenceState) -> None:
            await run_one(branch)
            if after_branch:
                await after_branch(branch)

        await gather(run_and_follow(branch) for branch in self.branches)
        if self.outer:  # branches that were cut while they waited have left their parent without its slot
            with suppress(ScopeCancelled):
                await self.parent.scope.run(self.outer.acquire_slots(self.parent))

    async def extend(self, branch: SequenceState, returned: int, *, path: bool = False) -> int:
        """Wait until a branch that has used up its lease may write more, without a slot in the meantime.

        Args:
            branch: The branch.
            returned: Tokens of its result that it has decoded.
            path: It waits for a longer critical path, and not for tokens.

        Returns:
            The tokens that its allowance has more, 0 for none.
        """
        if self.leases is None:
            return 0
        self.release_slot(branch)
        tokens = await self.leases.extend(branch, returned, path=path)
        await self.acquire_slots(branch)
        return tokens

    def release_slot(self, branch: SequenceState) -> None:
        """Let another branch run while this one waits."""
        if self._slots:
            self._slots.release(branch)

    async def acquire_slots(self, branch: SequenceState) -> None:
        """Wait until a branch, and the branches that it stands in, may run again."""
        if self.outer:
            await self.outer.acquire_slots(self.parent)
        if self._slots:
            await self._slots.acquire(branch)

    def _end_lease(self, branch: SequenceState) -> None:
        if self.leases:
            self.leases.end(branch)

    def end(self, branch: SequenceState) -> None:
        """Emit that a branch has ended, after all that it wrote."""
        if self._events.listening:
            self._events.emit(BranchEnded(branch.path, branch_outcome(branch.finish) or "ok"))

    def joined(self, branches: Sequence[SequenceState] | None = None) -> None:
        """Emit that branches (default: all) are in the text of their parent."""
        if self._events.listening:
            joined = self.branches if branches is None else branches
            self._events.emit(Joined(self.block, tuple(branch.path[-1] for branch in joined)))


class OuterLease:
    """The lease of a branch that forks, as the source of what its own branches share.

    Args:
        group: The group of the branch.
        leases: The leases of the group.
        branch: The branch.
        unreserved: Returns what its branches may have of the tokens that it gets.
    """

    def __init__(
        self,
        group: BranchGroup,
        leases: BranchLeases,
        branch: SequenceState,
        unreserved: Callable[[int], int],
    ) -> None:
        self._group, self._leases = group, leases
        self._branch, self._unreserved = branch, unreserved

    def ask(self, grant: Callable[[int], None]) -> None:
        self._group.release_slot(self._branch)
        self._leases.ask(self._branch, lambda tokens: grant(self._unreserved(tokens)))

    def withdraw(self) -> None:
        self._leases.withdraw(self._branch)


async def gather(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of coroutines that run at once. The first failure cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failed:
        error = first_error(failed)
        raise error from error.__cause__
    return [task.result() for task in tasks]


def first_error(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """What failed first. A group cancels and awaits its other tasks before it raises."""
    error = failed.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error
