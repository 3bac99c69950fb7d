"""The answer that most have come to; nothing is asked here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from sgl_apr.methods.task import Task


def vote(task: Task[Any, Any], answers: Sequence[str]) -> tuple[str, float]:
    """The answer with the most votes, and its share of all that could vote; an empty one votes for nothing.

    Of answers with as many votes it is the one that came first.
    """
    votes, first = Counter[Hashable](), dict[Hashable, str]()
    for answer in filter(None, answers):
        votes[task.vote_key(answer)] += 1
        first.setdefault(task.vote_key(answer), answer)
    best = max(votes, key=votes.__getitem__, default=None)
    return first.get(best, ""), votes[best] / len(answers) if votes else 0.0
