"""Limits of one trajectory. `fork_rules` divides them before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sgl_apr.errors import BudgetExceeded
from sgl_apr.runtime.value_checks import check_numbers, number_types, shorten


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one trajectory, its nested branches included.

    None leaves a limit out. `Trajectory.limits` says which limit acted where. When a limit is reached, open tags are
    closed by injection and the trunk continues with what was reserved for it, so that every reply is complete.

    Attributes:
        tokens: Decoded and injected tokens of the whole reply.
        critical_tokens: Tokens along the longest chain, the critical path.
        branch_tokens: Decoded tokens of one branch.
        width: Branches of a fork. The mask enforces it. None leaves it to the dialect.
        depth: How deep forks may nest.
        blocks: Forks, nested ones included. The branches of a fork get equal parts of `blocks` and `calls`, so that
            what one may do does not depend on how fast another is.
        calls: Engine requests, commits and retries included.
        outline_chars: Characters of one outline, which is then one line without `<`.
        seconds: Wall time. Branches end early enough to leave the trunk its reserve.
        tool_calls: Calls of tools. The branches of a fork get equal parts.
        tool_seconds: Wall time of one call of a tool.
        tool_result_tokens: Tokens of the result of one call, without the form of the chat template.
        reserve: Share of the tokens, calls and time left at a fork that is kept for the text after the join.
    """

    tokens: int = 4096
    critical_tokens: int | None = None
    branch_tokens: int | None = None
    width: int | None = None
    depth: int = 1
    blocks: int | None = None
    calls: int | None = None
    outline_chars: int | None = None
    seconds: float | None = None
    tool_calls: int | None = None
    tool_seconds: float = 60.0
    tool_result_tokens: int = 1024
    reserve: float = 0.25

    def __post_init__(self) -> None:
        lowest = {
            "tokens": 1, "critical_tokens": 1, "branch_tokens": 1, "width": 2, "depth": 1, "blocks": 0,
            "calls": 1, "outline_chars": 1, "tool_calls": 0, "tool_result_tokens": 1,
        }  # fmt: skip
        check_numbers(self, "budget", BudgetExceeded)
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise BudgetExceeded(f"budget {name}={value}, expected at least {low}")
        if self.seconds is not None and not self.seconds > 0:
            raise BudgetExceeded(f"budget seconds={self.seconds}, expected more than 0")
        if not self.tool_seconds > 0:
            raise BudgetExceeded(f"budget tool_seconds={self.tool_seconds}, expected more than 0")
        if not 0 < self.reserve < 1:
            raise BudgetExceeded(f"budget reserve={self.reserve}, expected a share between 0 and 1")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from text, as on a command line.

        Raises:
            BudgetExceeded: The text is no list of limits. The message names the limits.

        Examples:
            >>> Budget.parse("tokens=1024,seconds=2.5")
            Budget(tokens=1024, critical_tokens=None, branch_tokens=None, width=None, depth=1, blocks=None, calls=None, outline_chars=None, seconds=2.5, tool_calls=None, tool_seconds=60.0, tool_result_tokens=1024, reserve=0.25)
        """
        kinds = number_types(cls)
        limits: dict[str, Any] = {}
        for item in filter(None, text.split(",")):
            name, _, value = item.partition("=")
            try:
                limits[name] = kinds[name](value)
            except (KeyError, ValueError):
                raise BudgetExceeded(
                    f"budget {shorten(item)}, expected name=number with one of {', '.join(kinds)}"
                ) from None
        return cls(**limits)


@dataclass(frozen=True, slots=True)
class Overhead:
    """What closing costs at most, in tokens.

    Attributes:
        fork: To complete a fork that was cut off.
        branch: For the tags around one branch, and its result.
        join: For the join and the end of the text after it.
    """

    fork: int
    branch: int
    join: int

    def of(self, branches: int) -> int:
        """Tokens that close a fork of so many branches that was cut off at its start."""
        return self.fork + branches * self.branch + self.join


def lead_chars(tokens: int) -> int:
    """Characters of text before a fork that has to come, so that most of the tokens are left for the fork.

    It is a power of two, since the server keeps a compiled mask for every value.
    """
    return 1 << max(3, (tokens // 8).bit_length())
