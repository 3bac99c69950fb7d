"""The branches of one block: announced, run in parallel as paced, cut when a policy has enough, and joined."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from sgl_apr.runtime.cancel_scope import ScopeCancelled
from sgl_apr.runtime.events import BranchEnded, Forked, Joined
from sgl_apr.runtime.join_policy import Policy, stop_condition
from sgl_apr.runtime.sequence import BranchIdentity, SequenceState
from sgl_apr.runtime.span_graph import EventEmitter
from sgl_apr.trajectory.blocks import branch_outcome
from sgl_apr.trajectory.spans import Path

T = TypeVar("T")
RunBranch = Callable[[SequenceState], Awaitable[None]]


class BranchGroup:
    """The branches of block `block`.

    Attributes:
        branches: Those started so far, in order.
    """

    def __init__(self, block: Path, events: EventEmitter) -> None:
        self.block, self._events = block, events
        self.branches: list[SequenceState] = []

    def announce(self, identities: Sequence[BranchIdentity]) -> None:
        """Emit that these branches are forked, before anything of theirs."""
        labels = tuple((identity.number, identity.outline) for identity in identities)
        self._events.emit(Forked(self.block, labels, len(self.branches) + 1))

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
        slots = asyncio.Semaphore(parallelism or max(1, len(self.branches)))
        is_enough = stop_condition(policy, len(self.branches))
        ended: list[SequenceState] = []
        joins = asyncio.Event()

        async def run_one(branch: SequenceState) -> None:
            try:
                await branch.scope.run(slots.acquire())
            except ScopeCancelled:
                await run_branch(branch)
                return
            try:
                await run_branch(branch)
            finally:
                slots.release()
            if branch.finish == "failed":  # it counts for no policy
                return
            ended.append(branch)
            others = [b for b in self.branches if b not in ended]
            if others and not joins.is_set() and is_enough([b.as_branch() for b in ended]):
                joins.set()
                for other in others:
                    other.scope.cancel("aborted", "policy")

        async def run_and_follow(branch: SequenceState) -> None:
            await run_one(branch)
            if after_branch:
                await after_branch(branch)

        await gather(run_and_follow(branch) for branch in self.branches)

    def end(self, branch: SequenceState) -> None:
        """Emit that a branch has ended, after all that it wrote."""
        self._events.emit(BranchEnded(branch.path, branch_outcome(branch.finish) or "ok"))

    def joined(self, branches: Sequence[SequenceState] | None = None) -> None:
        """Emit that branches (default: all) are in the text of the sequence that forked them."""
        joined = self.branches if branches is None else branches
        self._events.emit(Joined(self.block, tuple(branch.path[-1] for branch in joined)))


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
