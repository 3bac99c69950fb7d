"""Join policies: when enough branches of a fork have ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sgl_apr.formats.options import JOIN_POLICY_PATTERN
from sgl_apr.trajectory.blocks import Branch

StopCondition = Callable[[Sequence[Branch]], bool]
Policy = str | StopCondition
POLICY_HELP = '"all", "first", "quorum:k", "deadline:s", or a function of the branches that have ended'


def is_valid_policy(policy: Policy) -> bool:
    """Whether `policy` is a function or one of the known texts."""
    return callable(policy) or (isinstance(policy, str) and bool(JOIN_POLICY_PATTERN.fullmatch(policy)))


def required_branches(policy: str, branches: int) -> int:
    """How many of so many branches have to end before the join.

    Failed branches do not count, so that a fault never counts as the first or towards a quorum.
    """
    kind, _, k = policy.partition(":")
    if kind == "first":
        return 1
    return min(int(k), branches) if kind == "quorum" else branches


def deadline_seconds(policy: Policy) -> float | None:
    """Seconds that the branches of one fork have, None without a deadline."""
    kind, _, s = policy.partition(":") if isinstance(policy, str) else ("", "", "")
    return float(s) if kind == "deadline" else None
