"""Turn rewards into advantages: how much better each reply is than its group."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Literal

EPS = 1e-6
Advantages = Literal["mean", "grpo", "papo"]


def grpo(rewards: Sequence[float], eps: float = EPS) -> list[float]:
    """`(r - mean) / (std + eps)` within a group of replies to one prompt (DeepSeekMath, arXiv 2402.03300).

    A group of one has nothing to be compared with: its advantage is 0.

    Examples:
        >>> grpo([1.0, 0.0])
        [0.999998000004, -0.999998000004]
    """
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    mean, std = fmean(rewards), pstdev(rewards)
    return [(r - mean) / (std + eps) for r in rewards]


def mean_only(rewards: Sequence[float]) -> list[float]:
    """`r - mean`: ThreadWeaver's P-GRPO (arXiv 2512.07843), applied to every call of the reply.

    Examples:
        >>> mean_only([1.0, 0.0])
        [0.5, -0.5]
    """
    mean = fmean(rewards) if len(rewards) > 1 else None
    return [0.0 if mean is None else r - mean for r in rewards]


def papo(groups: Sequence[Sequence[float | None]], eps: float = EPS) -> list[list[float]]:
    """NPR's PAPO: the mean of the group, the standard deviation of the batch.

    Args:
        groups: Rewards by group. None stands for a malformed reply: it counts in neither statistic, and its advantage is 0.
        eps: Added to the standard deviation.
    """
    well_formed = [[r for r in group if r is not None] for group in groups]
    batch = [r for group in well_formed for r in group]
    std = pstdev(batch) if len(batch) > 1 else 0.0
    advantages = []
    for group, counted in zip(groups, well_formed, strict=True):
        mean = fmean(counted) if len(counted) > 1 else None
        advantages.append([0.0 if r is None or mean is None else (r - mean) / (std + eps) for r in group])
    return advantages


def group_advantages(kind: Advantages, groups: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """Advantages of a batch, by group.

    Args:
        kind: "mean" is `mean_only`, "grpo" is `grpo`, "papo" is `papo`.
        groups: Rewards by group. None, a reply that the reward drops, has the advantage 0, and counts in no statistic.

    Examples:
        >>> group_advantages("mean", [[1.0, None, 0.0], [1.0]])
        [[0.5, 0.0, -0.5], [0.0]]
    """
    if kind == "papo":
        return papo(groups)
    within_group = mean_only if kind == "mean" else grpo
    advantages = []
    for group in groups:
        counted = iter(within_group([r for r in group if r is not None]))
        advantages.append([0.0 if r is None else next(counted) for r in group])
    return advantages
