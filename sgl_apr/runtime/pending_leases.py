"""Leases of branches that run while their sequence continues.

A branch that has used up its lease waits. When its sequence waits for it, and no branch of the block decodes any more, what
the others have left is leased again. So what a branch may write depends on what was written, never on speed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from sgl_apr.runtime.lease_pool import Lease, equal_parts
from sgl_apr.runtime.sequence import SequenceState


class PendingLeases:
    """The leases of the branches of one block that have not been joined.

    Args:
        closing: Tokens that the tags of one branch and its result take at most.
        results: Whether what a branch decodes may be written once more, as its result.
        final_tokens: Returns what a branch that has ended and its result take.
    """

    def __init__(
        self, closing: int, *, results: bool, final_tokens: Callable[[SequenceState, Lease], int]
    ) -> None:
        self.closing, self.results = closing, results
        self._final_tokens = final_tokens
        self._leases = dict[SequenceState, Lease]()
        self._changed = asyncio.Event()

    def add(self, branch: SequenceState, lease: Lease) -> None:
        """Add the lease of a branch that starts."""
        self._leases[branch] = lease

    def of(self, branch: SequenceState) -> Lease:
        """The lease of a branch."""
        return self._leases[branch]

    async def start(self, branch: SequenceState) -> None:
        """Nothing to wait for: a branch starts with its lease."""

    async def extend(self, branch: SequenceState, returned: int, *, path: bool = False) -> int:
        """Wait for more tokens of a branch that has used up its lease.

        Args:
            branch: The branch.
            returned: Tokens of its result that it has decoded.
            path: It waits for a longer critical path. There is none: its sequence writes on its own in the meantime.

        Returns:
            The tokens, which its allowance now has; 0 for none.
        """
        lease = self._leases[branch]
        granted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        lease.result_tokens = returned if self.results else 0
        if path or lease.tokens >= lease.max_tokens:
            return 0

        def grant(tokens: int) -> None:
            if not granted.done():  # the branch may have been cut at the same time
                granted.set_result(tokens)

        lease.grant = grant
        self._changed.set()
        try:
            tokens = await granted
        finally:
            lease.grant = None
        branch.extend(tokens)
        return tokens

    def end(self, branch: SequenceState) -> None:
        """Note what a branch that has ended, and its result, have taken."""
        if lease := self._leases.get(branch):
            lease.final_tokens = self._final_tokens(branch, lease)
        self._changed.set()

    def remove(self, branch: SequenceState) -> None:
        """Remove a branch that has been joined."""
        del self._leases[branch]

    async def wait_for(self, branches: Iterable[SequenceState]) -> bool:
        """Wait until branches have ended, or nobody decodes.

        Returns:
            Whether they have all ended.
        """
        awaited = [self._leases[branch] for branch in branches]
        while True:
            if all(lease.final_tokens is not None for lease in awaited):
                return True
            if all(one.final_tokens is not None or one.grant for one in self._leases.values()):
                return False
            self._changed.clear()
            await self._changed.wait()

    def lease_again(self, tokens: int) -> bool:
        """Lease tokens, with what is set aside for results, to branches that wait.

        Returns:
            Whether there was enough of them to be of use.
        """
        waiting = [lease for lease in self._leases.values() if lease.grant]
        granted = equal_parts(tokens // (1 + self.results), waiting)
        for lease, more in granted.items():
            lease.add(more, results=self.results)
            lease.answer(more)
        return bool(granted)

    def refuse(self) -> None:
        """Tell branches that wait that there is nothing more."""
        for lease in self._leases.values():
            lease.answer(0)
