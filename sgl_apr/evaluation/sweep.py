"""Sweeps: the same evaluation under several values of a limit, whose accuracies are a curve for each method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.evaluation.metrics import MethodResults, compare_methods
from sgl_apr.evaluation.store import RUN_FILE, read_comparable_results
from sgl_apr.runtime.budget import Budget

LIMITS = {
    "tokens": "tokens of a reply, at most",
    "critical_tokens": "tokens of the critical path, at most",
    "calls": "calls of a reply, at most",
    "seconds": "seconds of a reply, at most",
}
DIRECTORY = re.compile(rf"({'|'.join(LIMITS)})-(\d+(?:\.\d+)?)")


@dataclass(frozen=True, order=True, slots=True)
class SweepLevel:
    """A value of a limit.

    Attributes:
        limit: A field of `Budget`, one of `LIMITS`.
        value: Its value.
    """

    limit: str
    value: float

    def __str__(self) -> str:
        return f"{self.limit}={self.value:g}"

    @property
    def directory(self) -> str:
        """The directory of its evaluation.

        Examples:
            >>> SweepLevel("tokens", 256).directory
            'tokens-256'
        """
        return f"{self.limit}-{self.value:.15g}"

    def applied_to(self, budget: Budget) -> Budget:
        """A budget with this limit in place of its own.

        Raises:
            AprError: The value is none that the limit can have.
        """
        is_count = self.limit != "seconds"
        if is_count and self.value != int(self.value):
            raise AprError(f"--sweep {self}, expected whole {self.limit}")
        fields: dict[str, Any] = {self.limit: int(self.value) if is_count else self.value}
        return replace(budget, **fields)


def parse_levels(text: str) -> list[SweepLevel]:
    """Parse a limit with its values.

    Examples:
        >>> [str(level) for level in parse_levels("tokens=256,512")]
        ['tokens=256', 'tokens=512']

    Raises:
        AprError: It is no limit, or has no values.
    """
    limit, _, values = text.partition("=")
    try:
        levels = [SweepLevel(limit.strip(), float(value)) for value in values.split(",")]
    except ValueError:
        levels = []
    if limit.strip() not in LIMITS or not levels or not all(0 < each.value < float("inf") for each in levels):
        raise AprError(f"--sweep {text!r}, expected one of {', '.join(LIMITS)} and values: tokens=256,512")
    return levels


def sweep_directories(directory: Path) -> dict[SweepLevel, Path]:
    """The evaluations of a sweep in a directory, by limit and value; none if it is no sweep."""
    found = {}
    if directory.is_dir():
        for path in directory.iterdir():
            if (level := level_of(path)) and (path / RUN_FILE).is_file():
                found[level] = path
    return dict(sorted(found.items()))


def level_of(path: Path) -> SweepLevel | None:
    """The level whose evaluation a directory of a sweep holds; None for any other path."""
    match = DIRECTORY.fullmatch(path.name)
    return SweepLevel(match[1], float(match[2])) if match and path.is_dir() else None


def read_sweep(directory: Path) -> dict[SweepLevel, list[MethodResults]]:
    """The methods of a sweep at each of its levels, on the problems that all methods of the level attempted.

    Raises:
        AprError: If a level cannot be read.
    """
    return {level: read_comparable_results(path)[0] for level, path in sweep_directories(directory).items()}


def compare_with_best(rows: Sequence[MethodResults]) -> list[dict[str, Any]]:
    """For each method how much less it solves than the best one, paired by problem.

    Args:
        rows: Methods that attempted the same problems. Those without attempts are left out.

    Returns:
        The method, the best one, the difference of their accuracies with its 95% interval, and the p-value of
        McNemar's exact test.
    """
    ran = [row for row in rows if row.attempts]
    if not ran:
        return []
    best = max(ran, key=lambda row: row.accuracy)
    compared = [(row, compare_methods(best, row)) for row in ran]
    return [
        {
            "method": row.method,
            "best": best.method,
            "difference": round(result.difference, 4),
            "ci95": [round(bound, 4) for bound in result.ci95],
            "p": result.p,
        }
        for row, result in compared
    ]
