"""Majority votes on answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from sgl_apr.methods.task import Task


def vote(task: Task[Any], answers: Sequence[str]) -> tuple[str, float]:
    """The answer with the most votes, the earliest one on a tie.

    Args:
        task: Decides by `vote_key` which answers are equal.
        answers: One answer per voter; an empty one is an abstention.

    Returns:
        The answer, and its share of all voters, abstentions included; ("", 0.0) without any vote.
    """
    votes, earliest = Counter[Hashable](), dict[Hashable, str]()
    for answer in filter(None, answers):
        votes[task.vote_key(answer)] += 1
        earliest.setdefault(task.vote_key(answer), answer)
    best = max(votes, key=votes.__getitem__, default=None)
    return earliest.get(best, ""), votes[best] / len(answers) if votes else 0.0
