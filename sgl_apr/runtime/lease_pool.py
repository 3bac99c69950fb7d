"""Tokens that the branches of one fork share: each writes on a lease, and what others leave is leased again.

Leases are granted in rounds: once every branch has ended or has used up its lease. So what a branch may write depends on
what the others wrote, never on how fast they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sgl_apr.runtime.allowance import NO_LIMIT

FIRST_LEASE = 64  # tokens: where a first lease would be shorter, fewer branches start, and the others wait
NEXT_LEASE = 8  # tokens: where a further lease would be shorter, fewer branches get one


@dataclass(eq=False, slots=True)
class Lease:
    """What one branch may write.

    Attributes:
        tokens: Tokens that it may have written and decoded in all, its prompt included.
        max_tokens: What `tokens` may grow to by the branch's own limits.
        result_tokens: Tokens that are set aside for what it returns as a message.
        started: Whether it has been granted any.
        final_tokens: What it and its result have taken, once it has ended.
        path_tokens: How long its critical path may become, from the fork on.
        path_result_tokens: Tokens that its result may add to the critical path of the sequence that forked.
        waits_for_path: Whether it waits for a longer path, and not for tokens.
        grant: Receives the tokens of the next lease, 0 for none, while the branch waits for one.
    """

    tokens: int
    max_tokens: int
    result_tokens: int = 0
    started: bool = False
    final_tokens: int | None = None
    path_tokens: int = NO_LIMIT
    path_result_tokens: int = NO_LIMIT
    waits_for_path: bool = False
    grant: Callable[[int], None] | None = None

    def committed(self, closing: int) -> int:
        """Tokens that it and its result take at most, with the `closing` tokens of its tags."""
        return self.tokens + self.result_tokens + closing if self.final_tokens is None else self.final_tokens

    def add(self, tokens: int, *, results: bool) -> None:
        """Grant more tokens; with `results` as many are set aside for its result. `answer` passes them on."""
        self.tokens += tokens
        self.result_tokens += tokens * results
        self.started = True

    def stop_waiting(self) -> Callable[[int], None] | None:
        """What receives the tokens that the branch waits for, if it waits. It waits no more."""
        grant, self.grant, self.waits_for_path = self.grant, None, False
        return grant

    def answer(self, tokens: int) -> None:
        """Tell a branch that waits how many tokens it has been granted, 0 for none."""
        if grant := self.stop_waiting():
            grant(tokens)


class LeaseSource(Protocol):
    """Where a pool of a nested fork gets more tokens: the lease of the branch that forked."""

    def ask(self, grant: Callable[[int], None]) -> None:
        """Ask for more tokens. `grant` is called with them, 0 for none, at once or later."""
        ...

    def withdraw(self) -> None:
        """Stop waiting for them."""
        ...


class LeasePool:
    """The leases of one fork.

    Args:
        capacity: Tokens that all branches and their results may take together, all of their tags included.
        closing: Tokens that the tags of one branch and its result take at most.
        results: Whether what a branch decodes may be written once more, as its result.
        source: Where more tokens come from once this pool has nothing to lease, if from anywhere.
        first_lease: Where a first lease would be shorter, fewer branches start (default: `FIRST_LEASE`).
        path_capacity: How long the critical path of the branches and of their results, which follow one another, may
            become. None where branches do not share it.
    """

    def __init__(
        self,
        capacity: int,
        closing: int,
        *,
        results: bool,
        source: LeaseSource | None = None,
        first_lease: int | None = None,
        path_capacity: int | None = None,
    ) -> None:
        self.path_capacity = path_capacity
        self.first_lease = FIRST_LEASE if first_lease is None else first_lease
        self.capacity, self.closing, self.results = capacity, closing, results
        self.leases: list[Lease] = []
        self._source, self._awaits_source = source, False

    @property
    def uncommitted(self) -> int:
        """Tokens that are neither written nor leased nor set aside."""
        return self.capacity - sum(lease.committed(self.closing) for lease in self.leases)

    def max_prompt_tokens(self, branches: int, equal: int) -> int:
        """Tokens of the prompt of one of so many branches: its equal share, or what a first lease is."""
        return max(equal, min(self.first_lease, self.capacity // branches - self.closing))

    def open(self, prompts: Sequence[int], equal: int, max_tokens: Sequence[int]) -> list[Lease]:
        """Make the first leases.

        Args:
            prompts: Tokens that each branch has been charged for already.
            equal: The equal share of each branch, its prompt included.
            max_tokens: What each lease may grow to.

        Returns:
            A lease for each branch. Each gets its equal share. Where that is too short to be of use, the first
            branches get more, and the others wait for what those leave.
        """
        self.leases = [Lease(*limits) for limits in zip(prompts, max_tokens, strict=True)]
        if self.path_capacity is not None:
            for lease in self.leases:  # an equal part for what is written in parallel, and for each result
                lease.path_tokens = lease.path_result_tokens = self.path_capacity // (1 + len(self.leases))
        if all(
            equal - one.tokens >= min(self.first_lease, one.max_tokens - one.tokens) for one in self.leases
        ):
            for lease in self.leases:
                lease.add(min(equal, lease.max_tokens) - lease.tokens, results=self.results)
        elif not self._distribute(self.leases) and self.leases:
            first = self.leases[0]  # one short branch is of more use than none
            tokens = self.uncommitted // (1 + self.results)
            first.add(max(0, min(tokens, first.max_tokens - first.tokens)), results=self.results)
        return self.leases

    def ask(self, lease: Lease, grant: Callable[[int], None], returned: int = 0) -> None:
        """Ask for more tokens than the lease has, all of which are used up.

        Args:
            lease: The lease of the branch that asks.
            grant: Is called with the tokens, 0 for none, at once or later.
            returned: Tokens of the result that the branch has decoded so far.
        """
        lease.result_tokens = returned if self.results else 0
        if lease.started and lease.tokens >= lease.max_tokens:
            grant(0)
            return
        lease.grant = grant
        self._settle()

    def ask_for_path(self, lease: Lease, grant: Callable[[int], None], returned: int) -> None:
        """Ask for a longer critical path than the lease has, all of which is used up.

        Args:
            lease: The lease of the branch that asks.
            grant: Is called with 0, at once or later. The lease has a longer path then, or there is none.
            returned: Tokens of the result that the branch has decoded so far.
        """
        if self.path_capacity is None:
            grant(0)
            return
        lease.path_result_tokens, lease.waits_for_path, lease.grant = returned, True, grant
        self._settle()

    def withdraw(self, lease: Lease) -> None:
        """Stop waiting. The branch has not ended."""
        lease.grant, lease.waits_for_path = None, False

    def end(self, lease: Lease, tokens: int, path_tokens: int = 0, path_result_tokens: int = 0) -> None:
        """Give back what a branch has not used.

        Args:
            lease: The lease of a branch that has ended.
            tokens: Tokens that it and its result take.
            path_tokens: The length of its critical path, from the fork on.
            path_result_tokens: Tokens that its result adds to the critical path.
        """
        lease.grant, lease.final_tokens = None, tokens
        lease.path_tokens, lease.path_result_tokens = path_tokens, path_result_tokens
        if self._awaits_source and self._source and all(one.final_tokens is not None for one in self.leases):
            self._awaits_source = False
            self._source.withdraw()
        self._settle()

    def _settle(self) -> None:
        """Grant a round of leases once no branch decodes any more."""
        running = [lease for lease in self.leases if lease.final_tokens is None]
        waiting = [lease for lease in running if lease.grant is not None]
        if not waiting or len(waiting) < len(running) or self._awaits_source:
            return
        longer = self._extend_paths([lease for lease in waiting if lease.waits_for_path])
        # Who has started continues before another starts.
        others = [lease for lease in waiting if not lease.waits_for_path and lease.grant]
        if self._distribute(sorted(others, key=lambda lease: not lease.started)) or longer:
            return
        # More tokens are of no use to those that wait for a longer path.
        if self._source is None or not others:
            for lease in others or waiting:  # what they leave of the path is for those that wait for it
                lease.answer(0)
            return
        self._awaits_source = True
        self._source.ask(self._receive)

    def _receive(self, tokens: int) -> None:
        """Lease tokens from the source. Where it has none left, there is nothing more to ask for."""
        self._awaits_source = False
        self.capacity += tokens
        if tokens == 0:
            self._source = None
        self._settle()

    def _extend_paths(self, waiting: list[Lease]) -> bool:
        """Let the paths of branches that wait become as long as the paths and results of the others allow.

        Returns:
            Whether any got a longer path that is of use.
        """
        if self.path_capacity is None or not waiting:
            return False
        others = [lease for lease in self.leases if lease not in waiting]
        longest = max((lease.path_tokens for lease in others), default=0)
        # Each that waits may reach x, and its result what it returned and x - path: max(longest, x) + all results fit.
        left = self.path_capacity - sum(lease.path_result_tokens for lease in self.leases)
        left += sum(lease.path_tokens for lease in waiting)
        longer = left // (1 + len(waiting))
        if longer < longest:
            longer = (left - longest) // len(waiting)
        extended = [lease for lease in waiting if longer - lease.path_tokens >= NEXT_LEASE]
        for lease in extended:
            lease.path_result_tokens += longer - lease.path_tokens
            lease.path_tokens, lease.waits_for_path = longer, False
            lease.answer(0)
        return bool(extended)

    def _distribute(self, candidates: list[Lease]) -> bool:
        """Lease equal parts of what is left, to as many of the candidates as can get enough to be of use.

        Returns:
            Whether any got something. The others continue to wait for what these leave.
        """
        granted = equal_parts(self.uncommitted // (1 + self.results), candidates)
        for lease, tokens in granted.items():
            lease.add(tokens, results=self.results)
        # A pool of a nested fork may ask again at once, so nobody of this round may seem to wait any more.
        for grant, tokens in [(lease.stop_waiting(), tokens) for lease, tokens in granted.items()]:
            if grant:
                grant(tokens)
        return bool(granted)


def equal_parts(tokens: int, candidates: Sequence[Lease]) -> dict[Lease, int]:
    """Divide tokens equally among as many of the candidates as can get enough to be of use.

    Args:
        tokens: What there is.
        candidates: Leases that may grow. The first ones come first where there is not enough for all.

    Returns:
        The tokens that each of them gets.
    """
    candidates = [lease for lease in candidates if lease.tokens < lease.max_tokens]
    while candidates:
        last, equal = candidates[-1], tokens // len(candidates)
        if equal >= min(NEXT_LEASE if last.started else FIRST_LEASE, last.max_tokens - last.tokens):
            break
        candidates.pop()
    return {lease: min(equal, lease.max_tokens - lease.tokens) for lease in candidates}
