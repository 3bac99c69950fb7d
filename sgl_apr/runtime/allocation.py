"""What one sequence may still spend, and how a fork divides it before anything is decoded; pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_apr.runtime.budget import Budget, Overhead

NO_LIMIT = 1 << 60


@dataclass
class Allowance:
    """What is left to one sequence, its branches included.

    tokens: of everything it writes. cap: the length of the critical path that it may reach. Closing a
    branch is in neither: it was set aside where the branch was forked off. `bound` names the limit that
    `tokens` came from.
    """

    tokens: int
    critical_path_cap: int
    blocks: int
    calls: int
    limiting_field: str = "tokens"

    @classmethod
    def of(cls, budget: Budget) -> Allowance:
        """All of a budget, for the trunk."""
        cap, blocks, calls = (
            NO_LIMIT if limit is None else limit
            for limit in (budget.critical_tokens, budget.blocks, budget.calls)
        )
        return cls(budget.tokens, cap, blocks, calls)


@dataclass(frozen=True, slots=True)
class BudgetAllocator:
    """How allowances are divided under one budget.

    `returned`: branches join by a message that they return. `committed`: each takes one more call to be joined.
    """

    budget: Budget
    overhead: Overhead
    joins_by_message: bool
    commits_branches: bool = False

    def critical_path_overhead(self, branches: int) -> int:
        """What closing a fork costs along the longest chain: results follow one another, branches do not."""
        return self.overhead.of(branches if self.joins_by_message else min(branches, 1))

    def blocking_limit(self, allowance: Allowance, reach: int, branches: int) -> str | None:
        """The limit that keeps a fork into so many from being written, or None.

        Half of what is left has to be more than tags; the fork, its commit, each branch (and the commit of
        each, in a join in the KV cache) and the text behind the join need a call.
        """
        if allowance.blocks < 1:
            return "blocks"
        if allowance.calls < branches * (1 + self.commits_branches) + 3:
            return "calls"
        if 2 * self.overhead.of(branches) > allowance.tokens:
            return allowance.limiting_field
        return (
            "critical_tokens"
            if 2 * self.critical_path_overhead(branches) > allowance.critical_path_cap - reach
            else None
        )

    def max_new_tokens(self, allowance: Allowance, reach: int, branches: int | None) -> tuple[int, str]:
        """Tokens that one request may decode, and the limit that they come from.

        Even a fork into so many `branches` that is cut off at its end can be closed; None is for a branch
        that may not fork, for which nothing is left to set aside.
        """
        if allowance.calls < 1:
            return 0, "calls"
        tokens, chain = allowance.tokens, allowance.critical_path_cap - reach
        if branches is not None:
            tokens, chain = tokens - self.overhead.of(branches), chain - self.critical_path_overhead(branches)
        return (chain, "critical_tokens") if chain < tokens else (tokens, allowance.limiting_field)

    def branch_allowance(self, allowance: Allowance, reach: int, branches: int) -> Allowance:
        """The equal part that each of so many branches gets; its `cap` counts from where it begins.

        Where a message comes back it may be as long as what its branch decoded. No tokens or calls are
        left to branches that can only be closed.
        """
        keep, o, n = 1 - self.budget.reserve, self.overhead, branches
        tokens = int((allowance.tokens - n * o.branch - o.join) * keep) // (n * (1 + self.joins_by_message))
        bound = allowance.limiting_field
        if self.budget.branch_tokens is not None and self.budget.branch_tokens < tokens:
            tokens, bound = self.budget.branch_tokens, "branch_tokens"
        results = n if self.joins_by_message else 0
        cap = int((allowance.critical_path_cap - reach - max(results, 1) * o.branch - o.join) * keep) // (
            1 + results
        )
        left = allowance.calls - n * self.commits_branches
        calls = min(int(left * keep), left - 1) // n or int(left > n)
        return Allowance(
            max(0, tokens), max(0, cap), max(0, allowance.blocks) // (n + 1), max(0, calls), bound
        )
