"""Metrics of attempts: accuracy with confidence intervals, accuracy within limits, tokens, critical path."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest
from math import comb
from statistics import fmean, quantiles

from sgl_apr.evaluation.benchmarks.base import Case
from sgl_apr.evaluation.cost_model import EngineCost, predict_speedup
from sgl_apr.evaluation.diversity import diversity, redundancy
from sgl_apr.methods.registry import MethodResult

RESAMPLES = 2000
MAX_SIZE_GROUPS = 8  # problems are grouped by size into this many groups at most
BY_NUMBERS_METRICS = (
    "accuracy",
    "fork_rate",
    "branches",
)  # of each group under "by_numbers", Countdown's name for the size
METRIC_NAMES = (
    "accuracy", "ci95", "total_tokens", "critical_path", "fork_rate", "wall_s", "context_mean", "context_max", "redundancy",
    "diversity", "claim_precision", "false_claims", "cached_share", "engine_calls", "label", "alone_s", "one_by_one_s", "took_s", "predicted_sequential_s",
    "predicted_parallel_s", "tool_calls", "tool_s", "critical_tool_s",
)  # fmt: skip


@dataclass(frozen=True)
class AttemptMetrics:
    """One attempt at a problem, without its text.

    Attributes:
        problem: Name of the problem.
        size: Its size, see `Case`.
        correct: Whether the answer is correct.
        tokens: Decoded tokens.
        critical_path: Tokens of the longest chain of dependent tokens.
        context: The longest context in which any token was decoded, prompt included, in tokens.
        branches: Number of branches.
        forks: Number of forks.
        calls: Requests to the engine.
        prompt_tokens: Prompt tokens over all requests.
        cached_tokens: Those of them that the cache held.
        label: What ran, as the method describes it.
        redundancy: See `sgl_apr.evaluation.diversity`.
        diversity: See `sgl_apr.evaluation.diversity`.
        took_s: Seconds that the trajectory took.
        sequential_s: Predicted by `sgl_apr.evaluation.cost_model`; None without an engine cost.
        parallel_s: The same, with its forks.
        tool_calls: Calls of tools.
        tool_s: Seconds that these calls took, added up.
        critical_tool_s: Seconds of tools on the chain that waits for them the longest.
        claimed: Whether the reply gives an answer at all. None in a file of an earlier version.
    """

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
    tool_calls: int = 0
    tool_s: float = 0.0
    critical_tool_s: float = 0.0
    claimed: bool | None = None

    @property
    def is_false_claim(self) -> bool | None:
        """Whether the reply gives an answer that is wrong; None if that is not known."""
        return None if self.claimed is None else self.claimed and not self.correct

    @classmethod
    def from_result(
        cls,
        case: Case,
        result: MethodResult,
        correct: bool,
        answer_key: Callable[[str], Hashable | None],
        cost: EngineCost | None = None,
    ) -> AttemptMetrics:
        """Measure one attempt; for `answer_key` see `sgl_apr.evaluation.diversity.diversity`."""
        m, trajectory = result.metrics, result.trajectory
        predicted = predict_speedup(trajectory, cost) if cost else None
        return cls(
            case.name, case.size, correct, m.total, m.critical_path, m.longest_context, m.branches, m.blocks,
            m.engine_calls, m.prompt_tokens, m.cached_tokens, result.label, redundancy(trajectory),
            diversity(trajectory, answer_key), trajectory.wall_s, predicted.sequential_s if predicted else None,
            predicted.parallel_s if predicted else None, m.tool_calls, m.tool_s, m.critical_tool_s,
            bool(result.answer.strip()),
        )  # fmt: skip


@dataclass(frozen=True)
class MethodResults:
    """The attempts of one method at many problems; means are over all of them.

    Attributes:
        method: Name of the method.
        attempts: One for each problem.
        wall_s: Seconds that all attempts took together.
        reason: Why there is no attempt.
        alone: Seconds for some of the problems one after another: with the method's own concurrency, and with one
            request at a time.
    """

    method: str
    attempts: Sequence[AttemptMetrics]
    wall_s: float = 0.0
    reason: str = ""
    alone: tuple[float, float] | None = None

    @cached_property
    def accuracy(self) -> float:
        """The share of problems that were solved."""
        return fmean(a.correct for a in self.attempts)

    @cached_property
    def ci95(self) -> tuple[float, float]:
        """95% bootstrap interval of the accuracy."""
        return bootstrap_interval([float(a.correct) for a in self.attempts])

    @property
    def cached_share(self) -> float:
        """The share of all prompt tokens that the cache held."""
        return sum(a.cached_tokens for a in self.attempts) / max(
            1, sum(a.prompt_tokens for a in self.attempts)
        )

    @property
    def claim_precision(self) -> float | None:
        """The share of answers that are right, among the replies that give one; None without an answer."""
        return _rounded_mean([float(a.correct) for a in self.attempts if a.claimed])

    @property
    def label(self) -> str:
        """What ran, as the method describes it; labels that differ in numbers alone are one, with the range of each number."""
        return merge_labels(a.label for a in self.attempts)

    def solved_within(self, limit: int, metric: Callable[[AttemptMetrics], int]) -> float:
        """The share of problems that were solved with a metric of `limit` or less."""
        return fmean(a.correct and metric(a) <= limit for a in self.attempts)

    def mean(self, metric: Callable[[AttemptMetrics], float]) -> float:
        """The mean of a metric."""
        return fmean(map(metric, self.attempts))

    def mean_known(self, metric: Callable[[AttemptMetrics], float | None]) -> float | None:
        """The mean of a metric over the attempts that have it, rounded; None if none has."""
        return _rounded_mean([x for x in map(metric, self.attempts) if x is not None])

    @property
    def by_size(self) -> Mapping[int, Sequence[AttemptMetrics]]:
        """Attempts by the size of their problems.

        More than `MAX_SIZE_GROUPS` sizes are merged into about as many groups of similar sizes, each under its largest size.
        """
        sizes = sorted({a.size for a in self.attempts})
        if len(sizes) > MAX_SIZE_GROUPS:
            cuts = quantiles([a.size for a in self.attempts], n=MAX_SIZE_GROUPS, method="inclusive")
            sizes = sorted({*(int(cut) for cut in cuts), sizes[-1]})
        groups: dict[int, list[AttemptMetrics]] = {size: [] for size in sizes}
        for attempt in self.attempts:
            groups[sizes[bisect_left(sizes, attempt.size)]].append(attempt)
        return {size: group for size, group in groups.items() if group}

    def as_json(self, windows: Sequence[int]) -> Mapping[str, object]:
        """These results as JSON values; every metric is None if the method could not run.

        Args:
            windows: Limits in tokens for the "within_..." entries.
        """
        if not self.attempts:
            return {
                "method": self.method,
                "problems": 0,
                **dict.fromkeys(METRIC_NAMES),
                "reason": self.reason,
            }
        forked = [a for a in self.attempts if a.forks]
        groups = {size: _group_json(group) for size, group in self.by_size.items()}
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
            "redundancy": self.mean_known(lambda a: a.redundancy),
            "diversity": self.mean_known(lambda a: a.diversity),
            "claim_precision": self.claim_precision,
            "false_claims": self.mean_known(lambda a: a.is_false_claim),
            "cached_share": round(self.cached_share, 4),
            "engine_calls": round(self.mean(lambda a: a.calls), 1),
            "label": self.label,
            "alone_s": self.alone and round(self.alone[0], 2),
            "one_by_one_s": self.alone and round(self.alone[1], 2),
            "took_s": self.mean_known(lambda a: a.took_s),
            "predicted_sequential_s": self.mean_known(lambda a: a.sequential_s),
            "predicted_parallel_s": self.mean_known(lambda a: a.parallel_s),
            "tool_calls": round(self.mean(lambda a: a.tool_calls), 2),
            "tool_s": round(self.mean(lambda a: a.tool_s), 3),
            "critical_tool_s": round(self.mean(lambda a: a.critical_tool_s), 3),
            "by_size": groups,
            "by_numbers": {
                size: {name: group[name] for name in BY_NUMBERS_METRICS} for size, group in groups.items()
            },
            "within_context": {w: round(self.solved_within(w, lambda a: a.context), 4) for w in windows},
            "within_tokens": {w: round(self.solved_within(w, lambda a: a.tokens), 4) for w in windows},
            "within_critical_path": {
                w: round(self.solved_within(w, lambda a: a.critical_path), 4) for w in windows
            },
        }


def _group_json(group: Sequence[AttemptMetrics]) -> dict[str, float | None]:
    """Metrics of problems of similar size; "width" is branches per fork over the attempts that fork."""
    return {
        "problems": len(group),
        "accuracy": round(fmean(a.correct for a in group), 4),
        "fork_rate": round(fmean(bool(a.forks) for a in group), 4),
        "branches": round(fmean(a.branches for a in group), 2),
        "width": _rounded_mean([a.branches / a.forks for a in group if a.forks]),
        "redundancy": _rounded_mean([a.redundancy for a in group if a.redundancy is not None]),
    }


def merge_labels(labels: Iterable[str]) -> str:
    """The different labels of attempts in one text.

    Examples:
        >>> merge_labels(["exact", "exact", "", "style, 3 lost", "style, 12 lost"])
        'exact; style, 3 to 12 lost'
    """
    groups: dict[str, list[list[int]]] = {}
    for label in sorted({label for label in labels if label}):
        groups.setdefault(re.sub(r"\d+", "\0", label), []).append([int(n) for n in re.findall(r"\d+", label)])
    merged = []
    for text, numbers in groups.items():
        ranges = (
            f"{min(each)}" if min(each) == max(each) else f"{min(each)} to {max(each)}"
            for each in zip(*numbers, strict=True)
        )  # fmt: skip
        merged.append("".join(chain(*zip_longest(text.split("\0"), ranges, fillvalue=""))))
    return "; ".join(merged)


def _rounded_mean(values: Sequence[float]) -> float | None:
    return round(fmean(values), 4) if values else None


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the mean of some values."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[RESAMPLES // 40], means[-RESAMPLES // 40 - 1]


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same problems.

    Attributes:
        difference: The second's accuracy minus the first's.
        ci95: 95% bootstrap interval of the difference.
        p: p-value of McNemar's exact test, on the problems that only one of the two solved.
    """

    difference: float
    ci95: tuple[float, float]
    p: float


def compare_methods(first: MethodResults, second: MethodResults) -> Comparison:
    """Compare the accuracies of two methods, paired by problem.

    Raises:
        ValueError: Unless both attempted the same problems in the same order.
    """
    pairs = list(zip(first.attempts, second.attempts, strict=True))
    if any(a.problem != b.problem for a, b in pairs):
        raise ValueError("the methods did not attempt the same problems")
    differences = [float(b.correct) - float(a.correct) for a, b in pairs]
    up, down = differences.count(1.0), differences.count(-1.0)
    fewer, n = min(up, down), up + down
    p = min(1.0, 2 * sum(comb(n, k) for k in range(fewer + 1)) / 2**n) if n else 1.0
    return Comparison(fmean(differences), bootstrap_interval(differences), p)
