"""Votes on answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from sgl_apr.methods.task import Task


def vote(
    task: Task[Any], answers: Sequence[str], weights: Sequence[float] | None = None
) -> tuple[str, float]:
    """The answer with the most votes, the earliest one on a tie.

    Args:
        task: Decides by `vote_key` which answers are equal.
        answers: One answer per voter; an empty one is an abstention.
        weights: What each vote counts, 0 or more; None for 1 each.

    Returns:
        The answer, and its share of all votes, abstentions included; ("", 0.0) without any vote.
    """
    weights = [1.0] * len(answers) if weights is None else weights
    votes, earliest = Counter[Hashable](), dict[Hashable, str]()
    for answer, weight in zip(answers, weights, strict=True):
        if answer:
            votes[task.vote_key(answer)] += weight  # type: ignore[assignment]  # a Counter adds any numbers
            earliest.setdefault(task.vote_key(answer), answer)
    best = max(votes, key=votes.__getitem__, default=None)
    return earliest.get(best, ""), votes[best] / (sum(weights) or 1.0) if votes else 0.0
