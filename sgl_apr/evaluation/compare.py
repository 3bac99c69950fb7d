"""Methods of two evaluations, or of one, side by side on the problems that both tried; no attempt is made here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.evaluation.metrics import AttemptMetrics, Comparison, MethodResults, compare, interval
from sgl_apr.evaluation.store import RUN, SUMMARY, ResultStore


@dataclass(frozen=True)
class Pair:
    """Two methods by their names, with their attempts at the same problems in the same order."""

    names: tuple[str, str]
    rows: tuple[MethodResults, MethodResults]

    @property
    def comparison(self) -> Comparison:
        """Of what they solved."""
        return compare(*self.rows)

    def shift(self, of: Callable[[AttemptMetrics], float]) -> tuple[float, tuple[float, float]]:
        """How much more of something the second took, over problems the mean, with its 95% bootstrap interval."""
        pairs = zip(*(row.attempts for row in self.rows), strict=True)
        differences = [of(second) - of(first) for first, second in pairs]
        return fmean(differences), interval(differences)

    def as_json(self) -> Mapping[str, object]:
        """For machines."""
        compared, first = self.comparison, self.rows[0]
        return {
            "methods": list(self.names),
            "problems": len(first.attempts),
            "accuracy": [round(row.accuracy, 4) for row in self.rows],
            "difference": round(compared.difference, 4),
            "ci95": [round(x, 4) for x in compared.ci95],
            "p": compared.p,
            "total_tokens": self._costs(lambda a: a.tokens),
            "critical_path": self._costs(lambda a: a.critical_path),
        }

    def _costs(self, of: Callable[[AttemptMetrics], float]) -> Mapping[str, object]:
        difference, ci95 = self.shift(of)
        means = [round(row.mean(of), 1) for row in self.rows]
        return {"means": means, "difference": round(difference, 1), "ci95": [round(x, 1) for x in ci95]}


def pairs(first: str, second: str) -> list[Pair]:
    """What two evaluations compare: a method of each, or else each that both have.

    An evaluation is its directory, or a file of it; `DIRECTORY:METHOD` is one of its methods. Raises `AprError` for
    what is none, and for those that have no method, or no problem, in common.
    """
    sides = [_Side.of(first), _Side.of(second)]
    tasks = [side.asked["task"] for side in sides if side.asked.get("task")]
    if len(set(tasks)) > 1:
        raise AprError(f"{first} is of {tasks[0]}, {second} of {tasks[1]}, expected the same task")
    methods = [side.methods for side in sides]
    if len(methods[0]) == len(methods[1]) == 1:
        chosen = [(methods[0][0], methods[1][0])]
    else:
        chosen = [(name, name) for name in methods[0] if name in methods[1]]
    if not chosen:
        raise AprError(
            f"{first} has {', '.join(methods[0])}, {second} {', '.join(methods[1])}, expected a method of each: "
            "DIRECTORY:METHOD"
        )
    return [_pair(sides, names) for names in chosen]


@dataclass(frozen=True)
class _Side:
    """One of the two, as it was named."""

    name: str
    path: Path
    methods: Sequence[str]
    found: ResultStore
    asked: Mapping[str, Any]

    @classmethod
    def of(cls, named: str) -> _Side:
        path, method = Path(named), ""
        if not path.exists() and ":" in named:
            name, _, method = named.rpartition(":")
            path = Path(name)
        if path.name == SUMMARY:
            path = path.parent
        found = ResultStore()
        asked = found.load(path / RUN if path.is_dir() else path) or {}
        if not found.attempts or (method and method not in found.attempts):
            there = ", ".join(found.attempts) or "none"
            raise AprError(f"{path} has no attempt{f' of {method}' if method else ''}, its methods: {there}")
        return cls(named, path, [method] if method else [*found.attempts], found, asked)


def _pair(sides: Sequence[_Side], names: tuple[str, str]) -> Pair:
    rows = [side.found.row(name) for side, name in zip(sides, names, strict=True)]
    tried = [{attempt.problem: attempt for attempt in row.attempts} for row in rows]
    common = [problem for problem in tried[0] if problem in tried[1]]
    if not common:
        raise AprError(
            f"{sides[0].name} and {sides[1].name} have no problem in common, expected runs on the same problems"
        )
    first, second = (
        MethodResults(name, [by_problem[problem] for problem in common], row.wall_s)
        for name, by_problem, row in zip(names, tried, rows, strict=True)
    )
    labels = [f"{side.path.name}:{name}" for side, name in zip(sides, names, strict=True)]
    return Pair((labels[0], labels[1]), (first, second))
