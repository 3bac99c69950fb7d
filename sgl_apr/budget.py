"""What a trajectory may spend, divided before anything is decoded; it does not watch the clock."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_apr.errors import BudgetExceeded


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one trajectory.

    tokens: decoded and injected tokens of the whole reply, branches included.
    width: branches a fork may have, made impossible to exceed by the mask; None leaves it to the dialect.
    depth: how deep forks may nest.
    branch_tokens: tokens of one branch; None leaves that to the division of `tokens`.
    outline_chars: characters of one outline, which is then one line without `<`; None leaves it free.
    seconds: wall time after which the trajectory fails with `EngineTimeout`; None waits.
    """

    tokens: int = 4096
    width: int | None = None
    depth: int = 1
    branch_tokens: int | None = None
    outline_chars: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, low in (
            ("tokens", 1),
            ("width", 2),
            ("depth", 1),
            ("branch_tokens", 1),
            ("outline_chars", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise BudgetExceeded(f"budget {name}={value}, expected at least {low}")
        if self.seconds is not None and self.seconds <= 0:
            raise BudgetExceeded(f"budget seconds={self.seconds}, expected more than 0")


@dataclass(frozen=True, slots=True)
class Overhead:
    """What closing costs at most, in tokens: a cut-off fork, one branch around its text, and the join."""

    fork: int
    branch: int
    join: int

    def of(self, branches: int) -> int:
        """Enough to close a fork of that many branches that was cut off as it began."""
        return self.fork + branches * self.branch + self.join


# Share of what is left after a fork that the branches leave to the text behind the join.
AFTER_JOIN = 0.25


def trunk_tokens(left: int, overhead: Overhead, width: int) -> int:
    """Tokens a phase that may fork can decode so that even a fork cut off at its end can be closed."""
    return left - overhead.of(width)


def lead_chars(tokens: int) -> int:
    """Characters of text before a fork that has to come, so that most of a phase's tokens are left for it.

    A power of two: there are few of them, and the server keeps a compiled mask for each.
    """
    return 1 << max(3, (tokens // 8).bit_length())


def branch_tokens(
    left: int, overhead: Overhead, branches: int, limit: int | None, *, returned: bool = False
) -> int:
    """Tokens each branch may decode, the same for all: 0 if they can only be closed.

    Where a message comes back (`returned`), it may be as long as what the branch decoded.
    """
    free = left - branches * overhead.branch - overhead.join
    share = int(free * (1 - AFTER_JOIN)) // (branches * (1 + returned))
    return max(0, min(share, limit if limit is not None else share))
