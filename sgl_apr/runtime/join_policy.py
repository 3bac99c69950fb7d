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


def stop_condition(policy: Policy, branches: int) -> StopCondition:
    """The function that decides from the ended branches whether the join happens.

    Its argument has the branches in the order in which they ended. Failed branches are not among them, so that a
    fault never counts as the first or towards a quorum.

    Args:
        policy: The policy.
        branches: How many branches the fork has.
    """
    if callable(policy):
        return policy
    kind, _, k = policy.partition(":")
    wanted = {"first": 1, "quorum": min(int(k), branches) if kind == "quorum" else 0}.get(kind, branches)
    return lambda ended: len(ended) >= wanted


def deadline_seconds(policy: Policy) -> float | None:
    """Seconds that the branches of one fork have, None without a deadline."""
    kind, _, s = policy.partition(":") if isinstance(policy, str) else ("", "", "")
    return float(s) if kind == "deadline" else None
