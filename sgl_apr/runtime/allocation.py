"""What one sequence may still spend, and how a fork divides it before anything is decoded. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sgl_apr.runtime.budget import Budget, Overhead

NO_LIMIT = 1 << 60


@dataclass
class Allowance:
    """What one sequence and its branches may still spend.

    The tokens that close a branch are in none of these fields. They were set aside when the branch was forked.

    Attributes:
        tokens: Tokens that may still be written.
        critical_path_cap: The length, in tokens, that the critical path may reach.
        blocks: Forks that may still be made.
        calls: Engine requests that may still be sent.
        limiting_field: The limit that `tokens` comes from.
    """

    tokens: int
    critical_path_cap: int
    blocks: int
    calls: int
    limiting_field: str = "tokens"

    @classmethod
    def of(cls, budget: Budget) -> Allowance:
        """The whole budget, for the trunk."""
        cap, blocks, calls = (
            NO_LIMIT if limit is None else limit
            for limit in (budget.critical_tokens, budget.blocks, budget.calls)
        )
        return cls(budget.tokens, cap, blocks, calls)

    def limited_to(self, tokens: int, field: str) -> Allowance:
        """A copy with at most `tokens` tokens; `field` names the limit if it is the lower one."""
        return replace(self, tokens=tokens, limiting_field=field) if tokens < self.tokens else self

    def starting_at(self, length: int) -> Allowance:
        """A copy whose critical path begins at `length` tokens."""
        return replace(self, critical_path_cap=length + self.critical_path_cap)

    def spend(self, tokens: int = 0, *, critical_path: int = 0, blocks: int = 0, calls: int = 0) -> None:
        """Take from the allowance. Nothing else writes to one."""
        self.tokens -= tokens
        self.critical_path_cap -= critical_path
        self.blocks -= blocks
        self.calls -= calls

    def refund(self, tokens: int = 0, *, critical_path: int = 0, blocks: int = 0, calls: int = 0) -> None:
        """Give back what was spent or set aside."""
        self.spend(-tokens, critical_path=-critical_path, blocks=-blocks, calls=-calls)


@dataclass(frozen=True, slots=True)
class BudgetAllocator:
    """Divides allowances under one budget.

    Attributes:
        budget: The limits of the trajectory.
        overhead: What closing costs, in tokens.
        joins_by_message: Branches return a message, which is written once more.
        commits_branches: Each branch takes one more call, to be joined in the KV cache.
    """

    budget: Budget
    overhead: Overhead
    joins_by_message: bool
    commits_branches: bool = False

    def critical_path_overhead(self, branches: int) -> int:
        """Tokens that closing a fork adds to the critical path. Messages follow one another, branches do not."""
        return self.overhead.of(branches if self.joins_by_message else min(branches, 1))

    def calls_for(self, branches: int) -> int:
        """Calls that a fork needs: the fork, its commit, each branch, and the text after the join."""
        return branches * (1 + self.commits_branches) + 3

    def blocking_limit(self, allowance: Allowance, critical_path: int, branches: int) -> str | None:
        """The limit that rules out a fork into so many branches, or None.

        Half of what is left has to be more than tags.
        """
        if allowance.blocks < 1:
            return "blocks"
        if allowance.calls < self.calls_for(branches):
            return "calls"
        if 2 * self.overhead.of(branches) > allowance.tokens:
            return allowance.limiting_field
        left = allowance.critical_path_cap - critical_path
        return "critical_tokens" if 2 * self.critical_path_overhead(branches) > left else None

    def max_new_tokens(
        self, allowance: Allowance, critical_path: int, branches: int | None
    ) -> tuple[int, str]:
        """Tokens that one request may decode, and the limit that they come from.

        Args:
            allowance: What the sequence may spend.
            critical_path: Length of the longest path to the next span, in tokens.
            branches: What is left can close a fork into so many that is cut off at its end. None for a branch
                that may not fork, for which nothing is left to set aside.
        """
        if allowance.calls < 1:
            return 0, "calls"
        tokens, path = allowance.tokens, allowance.critical_path_cap - critical_path
        if branches is not None:
            tokens, path = (
                tokens - self.overhead.of(branches),
                path - self.critical_path_overhead(branches),
            )
        return (path, "critical_tokens") if path < tokens else (tokens, allowance.limiting_field)

    def branch_allowance(self, allowance: Allowance, critical_path: int, branches: int) -> Allowance:
        """The equal part that each of so many branches gets; its critical path counts from where it begins.

        A message that comes back may be as long as what its branch decoded. A branch that can only be closed gets
        no tokens or no calls.
        """
        keep, o, n = 1 - self.budget.reserve, self.overhead, branches
        tokens = int((allowance.tokens - n * o.branch - o.join) * keep) // (n * (1 + self.joins_by_message))
        field = allowance.limiting_field
        if self.budget.branch_tokens is not None and self.budget.branch_tokens < tokens:
            tokens, field = self.budget.branch_tokens, "branch_tokens"
        messages = n if self.joins_by_message else 0
        path = allowance.critical_path_cap - critical_path - max(messages, 1) * o.branch - o.join
        cap = int(path * keep) // (1 + messages)
        left = allowance.calls - n * self.commits_branches
        calls = min(int(left * keep), left - 1) // n or int(left > n)
        return Allowance(
            max(0, tokens), max(0, cap), max(0, allowance.blocks) // (n + 1), max(0, calls), field
        )
