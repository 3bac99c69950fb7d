"""Measure how much the branches of a fork differ, in their text and in their answers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from statistics import fmean

from sgl_apr.trajectory.blocks import Branch
from sgl_apr.trajectory.trajectory import Trajectory

NGRAM_SIZE = 4  # tokens
EXCLUDED_ROLES = ("header", "closer", "call")  # all branches have these alike, or at least their form


def token_ngrams(ids: Sequence[int], size: int = NGRAM_SIZE) -> frozenset[tuple[int, ...]]:
    """All runs of `size` consecutive tokens; a shorter sequence is one run.

    Examples:
        >>> sorted(token_ngrams((1, 2, 3), 2)), token_ngrams((7,))
        ([(1, 2), (2, 3)], frozenset({(7,)}))
    """
    return frozenset(tuple(ids[k : k + size]) for k in range(max(1, len(ids) - size + 1)))


def jaccard_similarity(one: frozenset[tuple[int, ...]], other: frozenset[tuple[int, ...]]) -> float:
    """The share of their union that two sets have in common, from 0 to 1."""
    return len(one & other) / len(one | other)


def redundancy(trajectory: Trajectory) -> float | None:
    """How similar the branches of each fork are, averaged over forks.

    For one fork it is the mean Jaccard similarity over pairs of branches of the 4-grams of tokens that they decoded. Nested
    branches count; headers, closers and calls of tools do not.

    Returns:
        A number from 0 to 1; None if no fork has two branches with decoded tokens.
    """
    by_fork = list[float]()
    for block in trajectory.blocks:
        spans = [[trajectory.spans[i] for i in branch.spans] for branch in block.branches]
        counted = [
            [s for s in own if s.origin == "decoded" and s.role not in EXCLUDED_ROLES] for own in spans
        ]
        decoded = [[t for s in own for t in s.token_ids or ()] for own in counted]
        pairs = combinations([token_ngrams(ids) for ids in decoded if ids], 2)
        if similarities := [jaccard_similarity(*pair) for pair in pairs]:
            by_fork.append(fmean(similarities))
    return fmean(by_fork) if by_fork else None


def diversity(trajectory: Trajectory, answer_key: Callable[[str], Hashable | None]) -> float | None:
    """The number of different answers of the branches of a fork over the number of answers, averaged over forks.

    A branch's answer is read from the message that it returned, or else from what it wrote after its last call of a tool.

    Args:
        trajectory: The trajectory.
        answer_key: Reads the answer of a text as a value that equal answers share; None if it has no answer.

    Returns:
        A number from 0 to 1; None if no fork has two branches with an answer.
    """
    by_fork = list[float]()
    for block in trajectory.blocks:
        keys = [answer_key(branch.result or _conclusion(trajectory, branch)) for branch in block.branches]
        answers = [key for key in keys if key is not None]
        if len(answers) > 1:
            by_fork.append(len(set(answers)) / len(answers))
    return fmean(by_fork) if by_fork else None


def _conclusion(trajectory: Trajectory, branch: Branch) -> str:
    """The text of a branch, or what follows its last call and its result if it called tools."""
    spans = [trajectory.spans[i] for i in branch.spans]
    tools = [k for k, s in enumerate(spans) if s.path == branch.path and s.role in ("call", "observation")]
    if not tools:
        return branch.text
    after = spans[tools[-1] + 1 :]
    return "".join(s.text for s in after if s.path != branch.path or s.role not in ("closer", "result"))
