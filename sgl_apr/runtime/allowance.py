"""What one sequence and its branches may still spend."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sgl_apr.runtime.budget import Budget

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
        tool_calls: Calls of tools that may still be made.
        limiting_field: The limit that `tokens` comes from.
    """

    tokens: int
    critical_path_cap: int
    blocks: int
    calls: int
    limiting_field: str = "tokens"
    tool_calls: int = NO_LIMIT

    @classmethod
    def of(cls, budget: Budget) -> Allowance:
        """The whole budget, for the trunk."""
        cap, blocks, calls, tool_calls = (
            NO_LIMIT if limit is None else limit
            for limit in (budget.critical_tokens, budget.blocks, budget.calls, budget.tool_calls)
        )
        return cls(budget.tokens, cap, blocks, calls, tool_calls=tool_calls)

    def limited_to(self, tokens: int, field: str) -> Allowance:
        """A copy with at most `tokens` tokens; `field` names the limit if it is the lower one."""
        return replace(self, tokens=tokens, limiting_field=field) if tokens < self.tokens else self

    def starting_at(self, length: int) -> Allowance:
        """A copy whose critical path begins at `length` tokens."""
        cap = length + self.critical_path_cap
        return Allowance(self.tokens, cap, self.blocks, self.calls, self.limiting_field, self.tool_calls)

    def spend(
        self,
        tokens: int = 0,
        *,
        critical_path: int = 0,
        blocks: int = 0,
        calls: int = 0,
        tool_calls: int = 0,
    ) -> None:
        """Take from the allowance. Nothing else writes to one."""
        self.tokens -= tokens
        self.critical_path_cap -= critical_path
        self.blocks -= blocks
        self.calls -= calls
        self.tool_calls -= tool_calls

    def refund(self, tokens: int = 0, *, critical_path: int = 0, blocks: int = 0, calls: int = 0) -> None:
        """Give back what was spent or set aside."""
        self.spend(-tokens, critical_path=-critical_path, blocks=-blocks, calls=-calls)
