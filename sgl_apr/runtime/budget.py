"""What a trajectory may spend, as asked for; `runtime.allowance` divides it before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sgl_apr.errors import BudgetExceeded

REAL = ("seconds", "reserve")  # all other limits are whole numbers


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one trajectory, its nested branches included; `Trajectory.limits` says which acted where.

    None leaves a limit out. Where one runs out, what is open is closed by injection, and the trunk goes on
    with what was reserved for it, so that every reply is whole.

    tokens: decoded and injected tokens of the whole reply, branches included.
    critical_tokens: the same along the longest chain (the critical path).
    branch_tokens: decoded tokens of one branch.
    width: branches a fork may have, made impossible to exceed by the mask; None leaves it to the dialect.
    depth: how deep forks may nest.
    blocks: forks, nested ones included. calls: engine requests, commits and retries included. Branches of
        a fork get equal parts of both, so that what one may do never depends on how fast another is.
    outline_chars: characters of one outline, which is then one line without `<`; None leaves it free.
    seconds: wall time. Branches have to end early enough to leave the trunk its reserve.
    reserve: share of the tokens, calls and time left at a fork that its branches leave to the text behind
        the join.
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
    reserve: float = 0.25

    def __post_init__(self) -> None:
        lowest = {
            "tokens": 1, "critical_tokens": 1, "branch_tokens": 1, "width": 2, "depth": 1, "blocks": 0,
            "calls": 1, "outline_chars": 1,
        }  # fmt: skip
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < low):
                raise BudgetExceeded(f"budget {name}={value}, expected at least {low}")
        if self.seconds is not None and not self.seconds > 0:
            raise BudgetExceeded(f"budget seconds={self.seconds}, expected more than 0")
        if not 0 < self.reserve < 1:
            raise BudgetExceeded(f"budget reserve={self.reserve}, expected a share between 0 and 1")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from text, as on a command line; raises `BudgetExceeded` that lists the names.

        >>> Budget.parse("tokens=1024,seconds=2.5")
        Budget(tokens=1024, critical_tokens=None, branch_tokens=None, width=None, depth=1, blocks=None, calls=None, outline_chars=None, seconds=2.5, reserve=0.25)
        """
        kinds: dict[str, type[int | float]] = {f.name: int for f in fields(cls)} | dict.fromkeys(REAL, float)
        limits: dict[str, Any] = {}
        for item in filter(None, text.split(",")):
            name, _, value = item.partition("=")
            try:
                limits[name] = kinds[name](value)
            except (KeyError, ValueError):
                raise BudgetExceeded(
                    f"budget {item!r}, expected name=number with one of {', '.join(kinds)}"
                ) from None
        return cls(**limits)


@dataclass(frozen=True, slots=True)
class Overhead:
    """What closing costs at most, in tokens: a cut-off fork, one branch around its text, and the join."""

    fork: int
    branch: int
    join: int

    def of(self, branches: int) -> int:
        """Enough to close a fork of that many branches that was cut off as it began."""
        return self.fork + branches * self.branch + self.join


def lead_chars(tokens: int) -> int:
    """Characters of text before a fork that has to come, so that most of a phase's tokens are left for it.

    A power of two: there are few of them, and the server keeps a compiled mask for each.
    """
    return 1 << max(3, (tokens // 8).bit_length())
