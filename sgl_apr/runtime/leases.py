"""The branches of one group wait here: for their slot to run in, and for the tokens that they may still write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from sgl_apr.runtime.lease_pool import Lease, LeasePool
from sgl_apr.runtime.sequence import SequenceState


class Slots:
    """How many branches of a group run at once. A branch gives up its slot while it waits for others.

    Args:
        count: Slots.
    """

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._held: set[SequenceState] = set()
        self._acquiring: dict[SequenceState, asyncio.Lock] = {}

    async def acquire(self, branch: SequenceState) -> None:
        """Wait for a slot, unless the branch has one."""
        if self.is_free_for(branch):
            await self._free.acquire()
            self._held.add(branch)
            return
        async with self._acquiring.setdefault(
            branch, asyncio.Lock()
        ):  # its own branches may wait for it together
            if branch not in self._held:
                await self._free.acquire()
                self._held.add(branch)

    def is_free_for(self, branch: SequenceState) -> bool:
        """Whether a branch without a slot gets one at once."""
        return not self._free.locked() and branch not in self._held and branch not in self._acquiring

    def release(self, branch: SequenceState) -> None:
        """Give up the slot of a branch, if it has one."""
        if branch in self._held:
            self._held.remove(branch)
            self._free.release()


class BranchLeases:
    """The leases of the branches of one group.

    Args:
        pool: What the branches share. Its leases are made.
        branches: One for each lease.
        final_tokens: Returns what a branch that has ended and its result take.
        path_start: The length of the critical path where the branches were forked.
        separate: Each branch has an allowance of its own, which gets what the branch is granted.

    Attributes:
        spare_calls: Calls that ended branches have left. Their parent gets back those that nobody else makes.
    """

    def __init__(
        self,
        pool: LeasePool,
        branches: Sequence[SequenceState],
        final_tokens: Callable[[SequenceState, Lease], int],
        *,
        path_start: int = 0,
        separate: bool = True,
    ) -> None:
        self._pool, self._final_tokens = pool, final_tokens
        self._path_start, self._separate = path_start, separate
        self._leases = dict(zip(branches, pool.leases, strict=True))
        self.spare_calls = 0

    def of(self, branch: SequenceState) -> Lease:
        """The lease of a branch."""
        return self._leases[branch]

    async def start(self, branch: SequenceState) -> None:
        """Wait for the first lease of a branch. It is 0 where the others have left none."""
        lease = self._leases[branch]
        if not lease.started:
            self._add(branch, await self._wait(lease, 0))

    async def extend(self, branch: SequenceState, returned: int, *, path: bool = False) -> int:
        """Wait until a branch that has used up its lease may write more.

        Args:
            branch: The branch.
            returned: Tokens of its result that it has decoded.
            path: It waits for a longer critical path, and not for tokens.

        Returns:
            The tokens, which its allowance now has; 0 for none.
        """
        lease = self._leases[branch]
        before = lease.path_tokens
        tokens = await self._wait(lease, returned, path)
        longer = lease.path_tokens - before
        branch.extend(0, critical_path=longer)
        self._add(branch, tokens, longer=longer > 0)
        return tokens

    def end(self, branch: SequenceState) -> None:
        """Give back what a branch that has ended leaves."""
        lease = self._leases[branch]
        if self._separate:
            self.spare_calls += branch.allowance.calls
            branch.allowance.spend(calls=branch.allowance.calls)
        tokens = self._final_tokens(branch, lease)
        self._pool.end(lease, tokens, branch.critical_path - self._path_start, tokens - branch.tokens_used)

    def ask(self, branch: SequenceState, grant: Callable[[int], None]) -> None:
        """Ask for more tokens for the branches of `branch`. Its allowance has them before `grant` is called."""

        def receive(tokens: int) -> None:
            self._add(branch, tokens)
            grant(tokens)

        self._pool.ask(self._leases[branch], receive)

    def withdraw(self, branch: SequenceState) -> None:
        """Stop waiting for what `ask` has asked for."""
        self._pool.withdraw(self._leases[branch])

    def _add(self, branch: SequenceState, tokens: int, *, longer: bool = False) -> None:
        """Add tokens to the allowance of a branch, and a call that ended branches have left if it has none.

        With `longer` its critical path has become longer.
        """
        if not self._separate:
            return
        branch.extend(tokens)
        if (tokens or longer) and branch.allowance.calls < 1 and self.spare_calls > 0:
            self.spare_calls -= 1
            branch.allowance.refund(calls=1)

    async def _wait(self, lease: Lease, returned: int, path: bool = False) -> int:
        granted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def grant(tokens: int) -> None:
            if not granted.done():
                granted.set_result(tokens)

        (self._pool.ask_for_path if path else self._pool.ask)(lease, grant, returned)
        try:
            return await granted
        except asyncio.CancelledError:
            self._pool.withdraw(lease)
            raise
