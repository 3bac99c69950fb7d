"""The Countdown twins side by side: accuracy within contexts, tokens and critical paths, paired; and a picture.

python -m benchmarks.quality.countdown SEQUENTIAL PARALLEL [RL] [--sampled PARALLEL RL] [--json] [--check] [-o docs/countdown.png]

Each is a directory that `sgl-apr eval countdown -o DIRECTORY` has written, all for the same problems; with --sampled two
more, at `--temperature 1`: the policy that reinforcement improves is one that samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware
from sgl_apr.evaluation.metrics import AttemptMetrics, MethodResults, compare_methods
from sgl_apr.evaluation.plots import plot_methods
from sgl_apr.evaluation.store import read_results
from sgl_apr.evaluation.tasks.countdown.problems import Problem, count_solutions

WINDOWS = (64, 128, 256, 512, 1024, 2048)
WAYS = {"1-2": 2, "3-4": 4, "5-6": 6}
FLAT = 0.01  # a window is flat if doubling it adds less
POINTS, SHORTER, BETTER, CHEAPER = 0.10, 1.5, 0.03, 0.10


def first(directory: Path) -> MethodResults:
    """The first method of a directory, under the directory's name."""
    row = read_results(directory)[0]
    return MethodResults(directory.name, row.attempts, row.wall_s)


def flattened(row: MethodResults) -> int:
    """The smallest window of which the double adds less than `FLAT`."""

    def within(window: int) -> float:
        return row.solved_within(window, lambda a: a.context)

    return next((w for w in WINDOWS if within(2 * w) - within(w) < FLAT and within(w) > 0.05), WINDOWS[-1])


def needed(row: MethodResults, accuracy: float, of: Callable[[AttemptMetrics], int]) -> int | None:
    """The limit within which a share of the problems is solved; None if it never is."""
    solved = sorted(of(a) for a in row.attempts if a.correct)
    count = -int(-accuracy * len(row.attempts) // 1)
    return solved[count - 1] if 0 < count <= len(solved) else None


def report(sequential: MethodResults, parallel: MethodResults, rl: MethodResults | None) -> dict[str, Any]:
    """Every figure."""
    window = flattened(sequential)

    def cut(row: MethodResults) -> MethodResults:
        kept = [
            AttemptMetrics(**{**asdict(a), "correct": a.correct and a.context <= window})
            for a in row.attempts
        ]
        return MethodResults(row.method, kept)

    gap = compare_methods(cut(sequential), cut(parallel))
    reached = min(sequential.accuracy, parallel.accuracy)
    chains = [needed(row, reached, lambda a: a.critical_path) for row in (sequential, parallel)]
    found: dict[str, Any] = {
        "hardware": hardware(),
        "rows": [row.as_json(WINDOWS) for row in (sequential, parallel, *([rl] if rl else []))],
        "window": window,
        "gap_at_window": asdict(gap),
        "equal_accuracy": reached,
        "critical_path_at_equal_accuracy": chains,
        "by_difficulty": {row.method: by_difficulty(row) for row in (parallel, *([rl] if rl else []))},
        "shorter": chains[0] / chains[1] if chains[0] and chains[1] else None,
    }
    if rl:
        found["rl"] = reinforced(parallel, rl)
    return found


def reinforced(before: MethodResults, after: MethodResults) -> dict[str, Any]:
    """What reinforcement came to."""

    def both(of: Callable[[AttemptMetrics], float]) -> list[float]:
        return [round(row.mean(of), 4) for row in (before, after)]

    return asdict(compare_methods(before, after)) | {
        "problems": len(after.attempts),
        "accuracy": both(lambda a: a.correct),
        "total_tokens": both(lambda a: a.tokens),
        "critical_path": both(lambda a: a.critical_path),
    }


def by_difficulty(row: MethodResults) -> list[dict[str, Any]]:
    """How a model goes about problems of like difficulty: so many numbers, so many ways to solve them."""
    kinds: dict[tuple[int, str], list[AttemptMetrics]] = {}
    for attempt in row.attempts:
        problem = Problem.parse(attempt.problem)
        found = count_solutions(problem)
        name = next(name for name, most in WAYS.items() if found <= most)
        kinds.setdefault((len(problem.numbers), name), []).append(attempt)
    return [
        {
            "numbers": numbers,
            "ways": name,
            "problems": len(own),
            "accuracy": round(fmean(a.correct for a in own), 3),
            "fork_rate": round(fmean(bool(a.forks) for a in own), 3),
            "branches": round(fmean(a.branches for a in own), 2),
            "total_tokens": round(fmean(a.tokens for a in own), 1),
            "critical_path": round(fmean(a.critical_path for a in own), 1),
        }
        for (numbers, name), own in sorted(kinds.items())
    ]


def missed(found: dict[str, Any]) -> list[str]:
    """Which bars are not met."""
    wrong = []
    if found["gap_at_window"]["difference"] < POINTS:
        wrong.append(
            f"{found['gap_at_window']['difference']:.1%} above at {found['window']}, expected {POINTS:.0%}"
        )
    if (found["shorter"] or 0) < SHORTER:
        wrong.append(f"critical path {found['shorter']} times shorter, expected {SHORTER}")
    rls = [found[name] for name in ("rl", "rl_sampled") if name in found]
    if rls and not any(map(better, rls)):
        wrong += [f"RL: {rl['difference']:+.1%}, critical path {rl['critical_path']}" for rl in rls]
    return wrong


def better(rl: dict[str, Any]) -> bool:
    """More accurate by enough, or as accurate on a path shorter by enough."""
    before, after = rl["critical_path"]
    return bool(rl["difference"] >= BETTER or (after <= (1 - CHEAPER) * before and rl["ci95"][1] >= 0))


def show(found: dict[str, Any]) -> None:
    console = Console(width=140)
    names = ("accuracy", "ci95", "total_tokens", "critical_path", "fork_rate", "wall_s")
    table = Table("model", *names, *(f"within {w}" for w in WINDOWS))
    for row in found["rows"]:
        table.add_row(
            row["method"],
            *(str(row[n]) for n in names),
            *(f"{row['within_context'][w]:.3f}" for w in WINDOWS),
        )
    console.print(table)
    for method, lines in found["by_difficulty"].items():
        by = Table(*lines[0], title=f"{method}, by difficulty")
        for line in lines:
            by.add_row(*map(str, line.values()))
        console.print(by)
    for name, value in found.items():
        if name not in ("rows", "by_difficulty"):
            console.print(f"{name}: {value}")


def main() -> int:
    """Print tables, or JSON; with --check, status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sequential", type=Path)
    add("parallel", type=Path)
    add("rl", type=Path, nargs="?")
    add("--sampled", type=Path, nargs=2, metavar="DIRECTORY", help="before and behind reinforcement")
    add("-o", "--out", type=Path, help="a picture")
    add("--json", action="store_true", help="one JSON object on stdout instead of tables")
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    rows = [first(d) for d in (options.sequential, options.parallel, options.rl) if d]
    found = report(rows[0], rows[1], rows[2] if len(rows) > 2 else None)
    if options.sampled:
        found["rl_sampled"] = reinforced(*map(first, options.sampled))
    if options.out:
        plot_methods(rows, options.out, "Countdown, the same held-out problems")
    return finish(found, missed(found), show, options)


if __name__ == "__main__":
    sys.exit(main())
