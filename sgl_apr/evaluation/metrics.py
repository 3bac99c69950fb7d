"""What attempts come to: accuracy with its confidence, within windows, by tokens and critical path; nothing is run."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb
from statistics import fmean, quantiles

from sgl_apr.evaluation.benchmarks.base import Case
from sgl_apr.evaluation.cost_model import Cost, predict_speedup
from sgl_apr.evaluation.diversity import diversity, redundancy
from sgl_apr.methods.registry import MethodResult

RESAMPLES = 2000
SIZES = 8  # groups of problems at most, by their size
NUMBERS = ("accuracy", "fork_rate", "branches")  # of a group, by numbers, as Countdown calls its size
FIGURES = (
    "accuracy", "ci95", "total_tokens", "critical_path", "fork_rate", "wall_s", "context_mean", "context_max", "redundancy",
    "diversity", "cached_share", "engine_calls", "label", "alone_s", "one_by_one_s", "took_s", "predicted_sequential_s",
    "predicted_parallel_s",
)  # fmt: skip


@dataclass(frozen=True)
class AttemptMetrics:
    """One attempt, without its text. tokens, critical_path, context: of the reply, its longest chain, and the
    longest context that any of its tokens was decoded in (prompt included). calls, prompt_tokens, cached_tokens: of
    the engine. label: of the method. redundancy, diversity: of its branches, see `sgl_apr.evaluation.diversity`. took_s: seconds
    of the trajectory. sequential_s, parallel_s: what `sgl_apr.evaluation.cost_model` says of it, where a cost is known."""

    problem: str
    size: int
    correct: bool
    tokens: int
    critical_path: int
    context: int
    branches: int
    forks: int
    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    label: str = ""
    redundancy: float | None = None
    diversity: float | None = None
    took_s: float | None = None
    sequential_s: float | None = None
    parallel_s: float | None = None

    @classmethod
    def of(
        cls,
        case: Case,
        result: MethodResult,
        correct: bool,
        read: Callable[[str], Hashable | None],
        cost: Cost | None = None,
    ) -> AttemptMetrics:
        """That of one attempt; `read` is what the answer of a text is counted as."""
        m, made = result.metrics, result.trajectory
        gained = predict_speedup(made, cost) if cost else None
        return cls(
            case.name, case.size, correct, m.total, m.critical_path, m.longest_context, m.branches, m.blocks,
            m.engine_calls, m.prompt_tokens, m.cached_tokens, result.label, redundancy(made), diversity(made, read),
            made.wall_s, gained.sequential_s if gained else None, gained.parallel_s if gained else None,
        )  # fmt: skip


@dataclass(frozen=True)
class MethodResults:
    """A method on many problems. Means are over all of them. reason: why it has none.

    alone: seconds for some of the problems one after another, as it is, and with one request at a time.
    """

    method: str
    attempts: Sequence[AttemptMetrics]
    wall_s: float = 0.0
    reason: str = ""
    alone: tuple[float, float] | None = None

    @cached_property
    def accuracy(self) -> float:
        """Share of the problems that were solved."""
        return fmean(a.correct for a in self.attempts)

    @cached_property
    def ci95(self) -> tuple[float, float]:
        """Bootstrap interval of the accuracy."""
        return interval([float(a.correct) for a in self.attempts])

    @property
    def cached_share(self) -> float:
        """How much of all prompts came from the cache."""
        return sum(a.cached_tokens for a in self.attempts) / max(
            1, sum(a.prompt_tokens for a in self.attempts)
        )

    @property
    def label(self) -> str:
        """What was run, as the method says."""
        return ", ".join(sorted({a.label for a in self.attempts if a.label}))

    def within(self, limit: int, of: Callable[[AttemptMetrics], int]) -> float:
        """Share that was solved with no more than `limit` of something, as of tokens."""
        return fmean(a.correct and of(a) <= limit for a in self.attempts)

    def mean(self, of: Callable[[AttemptMetrics], float]) -> float:
        """The mean of something."""
        return fmean(map(of, self.attempts))

    def known(self, of: Callable[[AttemptMetrics], float | None]) -> float | None:
        """The mean of something over the attempts of which it is known; None if it is of none."""
        return _rounded([x for x in map(of, self.attempts) if x is not None])

    @property
    def by_size(self) -> Mapping[int, Sequence[AttemptMetrics]]:
        """Attempts by the size of their problems; by about as many groups of like sizes, under the largest of each,
        where there are more than `SIZES`."""
        sizes = sorted({a.size for a in self.attempts})
        if len(sizes) > SIZES:
            cuts = quantiles([a.size for a in self.attempts], n=SIZES, method="inclusive")
            sizes = sorted({*(int(cut) for cut in cuts), sizes[-1]})
        found: dict[int, list[AttemptMetrics]] = {size: [] for size in sizes}
        for attempt in self.attempts:
            found[sizes[bisect_left(sizes, attempt.size)]].append(attempt)
        return {size: own for size, own in found.items() if own}

    def as_json(self, windows: Sequence[int]) -> Mapping[str, object]:
        """For machines; no figure of a method that could not be asked."""
        if not self.attempts:
            return {"method": self.method, "problems": 0, **dict.fromkeys(FIGURES), "reason": self.reason}
        forked = [a for a in self.attempts if a.forks]
        groups = {size: _group(own) for size, own in self.by_size.items()}
        return {
            "method": self.method,
            "problems": len(self.attempts),
            "accuracy": round(self.accuracy, 4),
            "ci95": [round(x, 4) for x in self.ci95],
            "total_tokens": round(self.mean(lambda a: a.tokens), 1),
            "critical_path": round(self.mean(lambda a: a.critical_path), 1),
            "fork_rate": round(len(forked) / len(self.attempts), 4),
            "wall_s": round(self.wall_s, 2),
            "context_mean": round(self.mean(lambda a: a.context), 1),
            "context_max": max(a.context for a in self.attempts),
            "redundancy": self.known(lambda a: a.redundancy),
            "diversity": self.known(lambda a: a.diversity),
            "cached_share": round(self.cached_share, 4),
            "engine_calls": round(self.mean(lambda a: a.calls), 1),
            "label": self.label,
            "alone_s": self.alone and round(self.alone[0], 2),
            "one_by_one_s": self.alone and round(self.alone[1], 2),
            "took_s": self.known(lambda a: a.took_s),
            "predicted_sequential_s": self.known(lambda a: a.sequential_s),
            "predicted_parallel_s": self.known(lambda a: a.parallel_s),
            "by_size": groups,
            "by_numbers": {size: {name: group[name] for name in NUMBERS} for size, group in groups.items()},
            "within_context": {w: round(self.within(w, lambda a: a.context), 4) for w in windows},
            "within_tokens": {w: round(self.within(w, lambda a: a.tokens), 4) for w in windows},
            "within_critical_path": {w: round(self.within(w, lambda a: a.critical_path), 4) for w in windows},
        }


def _group(own: Sequence[AttemptMetrics]) -> dict[str, float | None]:
    """What problems of like size came to. width: branches of a fork, by the attempts that fork."""
    return {
        "problems": len(own),
        "accuracy": round(fmean(a.correct for a in own), 4),
        "fork_rate": round(fmean(bool(a.forks) for a in own), 4),
        "branches": round(fmean(a.branches for a in own), 2),
        "width": _rounded([a.branches / a.forks for a in own if a.forks]),
        "redundancy": _rounded([a.redundancy for a in own if a.redundancy is not None]),
    }


def _rounded(values: Sequence[float]) -> float | None:
    return round(fmean(values), 4) if values else None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of a mean."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[RESAMPLES // 40], means[-RESAMPLES // 40 - 1]


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same problems. difference: of the accuracies, the second's over the first's, with its
    interval; p: of McNemar's exact test on the problems that only one of them solved."""

    difference: float
    ci95: tuple[float, float]
    p: float


def compare(first: MethodResults, second: MethodResults) -> Comparison:
    """A paired comparison; raises `ValueError` unless both tried the same problems in the same order."""
    pairs = list(zip(first.attempts, second.attempts, strict=True))
    if any(a.problem != b.problem for a, b in pairs):
        raise ValueError("the methods were not tried on the same problems")
    differences = [float(b.correct) - float(a.correct) for a, b in pairs]
    up, down = differences.count(1.0), differences.count(-1.0)
    fewer, n = min(up, down), up + down
    p = min(1.0, 2 * sum(comb(n, k) for k in range(fewer + 1)) / 2**n) if n else 1.0
    return Comparison(fmean(differences), interval(differences), p)
