"""How much the branches of a fork differ, in what they wrote and in what they say in the end; nothing is judged."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from statistics import fmean

from sgl_apr.trajectory.trajectory import Trajectory

GRAM = 4  # tokens
TAGS = ("header", "closer")  # what all branches have


def grams(ids: Sequence[int], size: int = GRAM) -> frozenset[tuple[int, ...]]:
    """All runs of so many tokens; fewer of them are one run.

    >>> sorted(grams((1, 2, 3), 2)), grams((7,))
    ([(1, 2), (2, 3)], frozenset({(7,)}))
    """
    return frozenset(tuple(ids[k : k + size]) for k in range(max(1, len(ids) - size + 1)))


def similarity(one: frozenset[tuple[int, ...]], other: frozenset[tuple[int, ...]]) -> float:
    """How much of what either has both have (Jaccard), from 0 to 1."""
    return len(one & other) / len(one | other)


def redundancy(trajectory: Trajectory) -> float | None:
    """How alike the branches of its forks are: the mean `similarity` of two of a fork by the runs of 4 tokens that they
    decoded, nested branches included and headers and closers left out, and over forks the mean of that; None without
    a fork of which two wrote."""
    found = list[float]()
    for block in trajectory.blocks:
        own = [[trajectory.spans[i] for i in branch.spans] for branch in block.branches]
        said = [[s for s in spans if s.origin == "decoded" and s.role not in TAGS] for spans in own]
        decoded = [[t for s in spans for t in s.token_ids or ()] for spans in said]
        pairs = combinations([grams(ids) for ids in decoded if ids], 2)
        if alike := [similarity(*pair) for pair in pairs]:
            found.append(fmean(alike))
    return fmean(found) if found else None


def diversity(trajectory: Trajectory, read: Callable[[str], Hashable | None]) -> float | None:
    """How many different answers the branches of a fork have, over how many have one; the mean over forks of which two
    have, None without such a fork.

    `read`: what the answer of a text is counted as, None if it has none. A branch's is that of the message that it
    returned, or else of all that it wrote.
    """
    found = list[float]()
    for block in trajectory.blocks:
        said = [read(branch.result or branch.text) for branch in block.branches]
        answers = [answer for answer in said if answer is not None]
        if len(answers) > 1:
            found.append(len(set(answers)) / len(answers))
    return fmean(found) if found else None
