"""When a vote is settled: the probability that its leader wins, from the votes so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import comb, exp, fsum, log
from typing import Literal, get_args

import numpy as np

from sgl_apr.errors import AprError

Stop = Literal["beta", "dirichlet", "cges"]
LOWEST, HIGHEST = 1e-6, 1 - 1e-6  # of a probability that a reply is right, so that no reply decides alone
QUADRATURE_POINTS = 4096


@dataclass(frozen=True, slots=True)
class Ballot:
    """The vote of one reply.

    Attributes:
        key: What it votes for. Equal answers have equal keys.
        probability: The probability that the reply is right (0 to 1), as far as known.
    """

    key: Hashable
    probability: float = 0.5


def beta_posterior(votes: Sequence[int]) -> float:
    """The probability that the leader has more votes than the second in the long run (Adaptive-Consistency: Aggarwal 2023,
    arXiv 2305.11860, section 3.1).

    The share of the leader among the votes for the first two has a Beta(v1 + 1, v2 + 1) distribution, and this is the
    probability that it is above one half.

    Args:
        votes: Votes of each answer, in any order.

    Examples:
        >>> beta_posterior([4]), beta_posterior([2, 2])
        (0.96875, 0.5)
    """
    first, second, *_ = [*sorted(votes, reverse=True), 0, 0]
    count = first + second + 1  # for whole numbers, the Beta distribution is a sum over a binomial one
    return sum(comb(count, k) for k in range(first + 1)) / float(2**count)


def dirichlet_posterior(votes: Sequence[int]) -> float:
    """The same against all other answers that have a vote (arXiv 2305.11860, section 3.1): the shares of the answers have a
    Dirichlet(v1 + 1, ..., vm + 1) distribution.

    The shares are Gamma variables divided by their sum, so the leader is the largest with probability
    E[prod_i P(G_i < x)], x ~ Gamma(v1 + 1). The integral is computed numerically.

    Args:
        votes: Votes of each answer, in any order.
    """
    first, *others = sorted(votes, reverse=True) or [0]
    if not others:
        return beta_posterior([first])
    width = 12 * (first + 1) ** 0.5 + 12
    x = np.linspace(1e-9, first + 1 + width, QUADRATURE_POINTS)
    density = np.exp(first * np.log(x) - x - _log_factorial(first))
    below = np.ones_like(x)
    for count in others:  # P(Gamma(n + 1) < x) = 1 - the sum of a Poisson distribution up to n
        terms = (np.exp(k * np.log(x) - x - _log_factorial(k)) for k in range(count + 1))
        below *= 1 - np.sum(list(terms), axis=0)
    return float(min(1.0, np.trapezoid(density * below, x)))


def cges_posterior(ballots: Sequence[Ballot]) -> dict[Hashable, float]:
    """The probability of each answer, from how sure each reply is (CGES, arXiv 2511.02603, section 3).

    If an answer is right, a reply of probability c names it with probability c, and each of the other candidates with
    probability (1 - c) / (m - 1). The candidates are the answers that were named, and one that was not.

    Args:
        ballots: The votes.

    Returns:
        For each answer that was named its probability. They add up to less than 1: what is missing is that of an answer that
        nobody has named.
    """
    keys: list[Hashable | None] = [*dict.fromkeys(ballot.key for ballot in ballots), None]
    others = max(1, len(keys) - 1)
    logs = []
    for position, key in enumerate(keys):
        is_new = position == len(keys) - 1
        likelihoods = []
        for ballot in ballots:
            right = min(max(ballot.probability, LOWEST), HIGHEST)
            likelihoods.append(log(right if not is_new and ballot.key == key else (1 - right) / others))
        logs.append(fsum(likelihoods))
    largest = max(logs)
    weights = [exp(value - largest) for value in logs]
    return {key: weight / sum(weights) for key, weight in zip(keys[:-1], weights[:-1], strict=True)}


def settled_probability(stop: Stop, ballots: Sequence[Ballot]) -> float:
    """The probability that the answer that leads is the one that wins; 0 without a vote.

    Args:
        stop: How it is computed: "beta", "dirichlet", or "cges".
        ballots: The votes so far.

    Raises:
        AprError: There is no such way.
    """
    if not ballots:
        return 0.0
    if stop == "cges":
        return max(cges_posterior(ballots).values())
    posterior = POSTERIORS.get(stop)
    if posterior is None:
        raise AprError(f"stop={stop!r}, expected one of {', '.join(get_args(Stop))}")
    return posterior([*Counter(ballot.key for ballot in ballots).values()])


POSTERIORS: dict[str, Callable[[Sequence[int]], float]] = {
    "beta": beta_posterior,
    "dirichlet": dirichlet_posterior,
}


def _log_factorial(n: int) -> float:
    return fsum(log(k) for k in range(2, n + 1))
