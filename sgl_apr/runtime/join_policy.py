"""When a join happens: which of its branches a fork waits for; it stops none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sgl_apr.formats.options import POLICY
from sgl_apr.trajectory.blocks import Branch

Enough = Callable[[Sequence[Branch]], bool]
Policy = str | Enough
POLICY_HELP = '"all", "first", "quorum:k", "deadline:s", or a function of the branches that have ended'


def is_valid_policy(policy: Policy) -> bool:
    """Whether it is a policy at all."""
    return callable(policy) or (isinstance(policy, str) and bool(POLICY.fullmatch(policy)))


def stop_condition(policy: Policy, branches: int) -> Enough:
    """Whether these branches, in the order in which they ended, are enough of so many for the join.

    What failed does not count, so that a fault never stands in for the first or makes up a quorum.
    """
    if callable(policy):
        return policy
    kind, _, k = policy.partition(":")
    wanted = {"first": 1, "quorum": min(int(k), branches) if kind == "quorum" else 0}.get(kind, branches)
    return lambda ended: sum(b.finish != "failed" for b in ended) >= wanted


def deadline_seconds(policy: Policy) -> float | None:
    """How long the branches of one fork have, or None."""
    kind, _, s = policy.partition(":") if isinstance(policy, str) else ("", "", "")
    return float(s) if kind == "deadline" else None
