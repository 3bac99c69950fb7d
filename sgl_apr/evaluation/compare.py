"""Paired comparisons of methods, from one evaluation or from two, on the problems that both attempted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.evaluation.metrics import (
    AttemptMetrics,
    Comparison,
    MethodResults,
    bootstrap_interval,
    compare_methods,
)
from sgl_apr.evaluation.store import RUN_FILE, SUMMARY_FILE, ResultStore


@dataclass(frozen=True)
class MethodPair:
    """Two methods with their attempts at the same problems, in the same order.

    Attributes:
        names: How each method is labelled, `DIRECTORY:METHOD`.
        results: The results of each.
    """

    names: tuple[str, str]
    results: tuple[MethodResults, MethodResults]

    @property
    def comparison(self) -> Comparison:
        """The difference of the accuracies, with its interval and p-value."""
        return compare_methods(*self.results)

    def mean_difference(self, metric: Callable[[AttemptMetrics], float]) -> tuple[float, tuple[float, float]]:
        """The second method's metric minus the first's, averaged over problems.

        Args:
            metric: Reads the metric of one attempt.

        Returns:
            The mean difference, and its 95% bootstrap interval.
        """
        pairs = zip(*(row.attempts for row in self.results), strict=True)
        differences = [metric(second) - metric(first) for first, second in pairs]
        return fmean(differences), bootstrap_interval(differences)

    def as_json(self) -> Mapping[str, object]:
        """This comparison as JSON values, for `sgl-apr eval --compare --json`."""
        compared, first = self.comparison, self.results[0]
        return {
            "methods": list(self.names),
            "problems": len(first.attempts),
            "accuracy": [round(row.accuracy, 4) for row in self.results],
            "difference": round(compared.difference, 4),
            "ci95": [round(x, 4) for x in compared.ci95],
            "p": compared.p,
            "total_tokens": self._metric_json(lambda a: a.tokens),
            "critical_path": self._metric_json(lambda a: a.critical_path),
            **(self._tool_metrics() if self.has_tool_calls else {}),
        }

    @property
    def has_tool_calls(self) -> bool:
        """Whether any attempt called a tool."""
        return any(attempt.tool_calls for row in self.results for attempt in row.attempts)

    def _tool_metrics(self) -> Mapping[str, object]:
        calls, seconds = (
            self._metric_json(lambda a: a.tool_calls, 2),
            self._metric_json(lambda a: a.tool_s, 3),
        )
        return {"tool_calls": calls, "tool_s": seconds}

    def _metric_json(
        self, metric: Callable[[AttemptMetrics], float], digits: int = 1
    ) -> Mapping[str, object]:
        difference, ci95 = self.mean_difference(metric)
        means = [round(row.mean(metric), digits) for row in self.results]
        interval = [round(x, digits) for x in ci95]
        return {"means": means, "difference": round(difference, digits), "ci95": interval}


def pair_evaluations(first: str, second: str) -> list[MethodPair]:
    """Pair the methods of two evaluations: one method of each, or else every method that both have.

    Args:
        first: The directory of an evaluation, or its run.jsonl; `DIRECTORY:METHOD` selects one method.
        second: The same.

    Raises:
        AprError: If a path holds no evaluation, or if the two differ in their task, or share no method or no problem.
    """
    sides = [_Side.load(first), _Side.load(second)]
    tasks = [side.settings["task"] for side in sides if side.settings.get("task")]
    if len(set(tasks)) > 1:
        raise AprError(f"{first} evaluated {tasks[0]}, {second} evaluated {tasks[1]}, expected the same task")
    methods = [side.methods for side in sides]
    if len(methods[0]) == len(methods[1]) == 1:
        chosen = [(methods[0][0], methods[1][0])]
    else:
        chosen = [(name, name) for name in methods[0] if name in methods[1]]
    if not chosen:
        raise AprError(
            f"{first} has {', '.join(methods[0])}, {second} has {', '.join(methods[1])}, expected one method of each as "
            "DIRECTORY:METHOD"
        )
    return [_pair(sides, names) for names in chosen]


@dataclass(frozen=True)
class _Side:
    """One of the two evaluations, as the user named it."""

    name: str
    path: Path
    methods: Sequence[str]
    store: ResultStore
    settings: Mapping[str, Any]

    @classmethod
    def load(cls, argument: str) -> _Side:
        path, method = Path(argument), ""
        if not path.exists() and ":" in argument:
            directory, _, method = argument.rpartition(":")
            path = Path(directory)
        if path.name == SUMMARY_FILE:
            path = path.parent
        store = ResultStore()
        settings = store.load(path / RUN_FILE if path.is_dir() else path) or {}
        if not store.attempts or (method and method not in store.attempts):
            methods = ", ".join(store.attempts) or "none"
            raise AprError(
                f"{path} has no attempt{f' of {method}' if method else ''}, its methods: {methods}"
            )
        return cls(argument, path, [method] if method else [*store.attempts], store, settings)


def _pair(sides: Sequence[_Side], names: tuple[str, str]) -> MethodPair:
    rows = [side.store.results_of(name) for side, name in zip(sides, names, strict=True)]
    attempted = [{attempt.problem: attempt for attempt in row.attempts} for row in rows]
    common = [problem for problem in attempted[0] if problem in attempted[1]]
    if not common:
        raise AprError(
            f"{sides[0].name} and {sides[1].name} have no problem in common, expected runs on the same problems"
        )
    first, second = (
        MethodResults(name, [by_problem[problem] for problem in common], row.wall_s)
        for name, by_problem, row in zip(names, attempted, rows, strict=True)
    )
    labels = [f"{side.path.name}:{name}" for side, name in zip(sides, names, strict=True)]
    return MethodPair((labels[0], labels[1]), (first, second))
