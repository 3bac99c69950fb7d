"""Compare the Countdown models on the same problems: accuracy within contexts, total tokens and critical paths; and plot it.

python -m benchmarks.quality.countdown SEQUENTIAL PARALLEL [RL] [--sampled PARALLEL RL] [--json] [--check] [-o docs/countdown.png]

Each argument is a directory that `sgl-apr eval countdown -o DIRECTORY` has written, all for the same problems. --sampled takes
two more, evaluated with `--temperature 1`, because reinforcement improves a policy that samples.
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
SOLUTIONS = {"1-2": 2, "3-4": 4, "5-6": 6}
FLAT = 0.01  # accuracy is flat at a window if doubling the window adds less
POINTS, SHORTER, BETTER, CHEAPER = 0.10, 1.5, 0.03, 0.10


def load_first(directory: Path) -> MethodResults:
    """The results of the first method in a directory, named after the directory."""
    row = read_results(directory)[0]
    return MethodResults(directory.name, row.attempts, row.wall_s)


def flat_window(row: MethodResults) -> int:
    """The smallest window at which doubling it adds less than `FLAT` to the accuracy."""

    def within(window: int) -> float:
        return row.solved_within(window, lambda a: a.context)

    return next((w for w in WINDOWS if within(2 * w) - within(w) < FLAT and within(w) > 0.05), WINDOWS[-1])


def required_limit(row: MethodResults, accuracy: float, cost: Callable[[AttemptMetrics], int]) -> int | None:
    """The limit on a cost within which a share of the problems is solved; None if it never is."""
    solved = sorted(cost(a) for a in row.attempts if a.correct)
    count = -int(-accuracy * len(row.attempts) // 1)
    return solved[count - 1] if 0 < count <= len(solved) else None


def report(sequential: MethodResults, parallel: MethodResults, rl: MethodResults | None) -> dict[str, Any]:
    """All figures: the rows, the gap at the flat window, critical paths at equal accuracy, and by difficulty."""
    window = flat_window(sequential)

    def within_window(row: MethodResults) -> MethodResults:
        attempts = [
            AttemptMetrics(**{**asdict(a), "correct": a.correct and a.context <= window})
            for a in row.attempts
        ]
        return MethodResults(row.method, attempts)

    gap = compare_methods(within_window(sequential), within_window(parallel))
    reached = min(sequential.accuracy, parallel.accuracy)
    chains = [required_limit(row, reached, lambda a: a.critical_path) for row in (sequential, parallel)]
    results: dict[str, Any] = {
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
        results["rl"] = reinforced(parallel, rl)
    return results


def reinforced(before: MethodResults, after: MethodResults) -> dict[str, Any]:
    """The effect of reinforcement."""

    def both(metric: Callable[[AttemptMetrics], float]) -> list[float]:
        return [round(row.mean(metric), 4) for row in (before, after)]

    return asdict(compare_methods(before, after)) | {
        "problems": len(after.attempts),
        "accuracy": both(lambda a: a.correct),
        "total_tokens": both(lambda a: a.tokens),
        "critical_path": both(lambda a: a.critical_path),
    }


def by_difficulty(row: MethodResults) -> list[dict[str, Any]]:
    """How a model solves problems of similar difficulty, by their numbers and the number of their solutions."""
    kinds: dict[tuple[int, str], list[AttemptMetrics]] = {}
    for attempt in row.attempts:
        problem = Problem.parse(attempt.problem)
        count = count_solutions(problem)
        name = next(name for name, largest in SOLUTIONS.items() if count <= largest)
        kinds.setdefault((len(problem.numbers), name), []).append(attempt)
    return [
        {
            "numbers": numbers,
            "ways": name,
            "problems": len(attempts),
            "accuracy": round(fmean(a.correct for a in attempts), 3),
            "fork_rate": round(fmean(bool(a.forks) for a in attempts), 3),
            "branches": round(fmean(a.branches for a in attempts), 2),
            "total_tokens": round(fmean(a.tokens for a in attempts), 1),
            "critical_path": round(fmean(a.critical_path for a in attempts), 1),
        }
        for (numbers, name), attempts in sorted(kinds.items())
    ]


def missed(results: dict[str, Any]) -> list[str]:
    """The bars that are missed, one sentence each."""
    problems = []
    if results["gap_at_window"]["difference"] < POINTS:
        problems.append(
            f"{results['gap_at_window']['difference']:.1%} above at {results['window']}, expected {POINTS:.0%}"
        )
    if (results["shorter"] or 0) < SHORTER:
        problems.append(f"critical path {results['shorter']} times shorter, expected {SHORTER}")
    rls = [results[name] for name in ("rl", "rl_sampled") if name in results]
    if rls and not any(map(is_better, rls)):
        problems += [f"RL: {rl['difference']:+.1%}, critical path {rl['critical_path']}" for rl in rls]
    return problems


def is_better(rl: dict[str, Any]) -> bool:
    """Whether a model is more accurate by `BETTER`, or as accurate with a critical path shorter by `CHEAPER`."""
    before, after = rl["critical_path"]
    return bool(rl["difference"] >= BETTER or (after <= (1 - CHEAPER) * before and rl["ci95"][1] >= 0))


def show(results: dict[str, Any]) -> None:
    console = Console(width=140)
    names = ("accuracy", "ci95", "total_tokens", "critical_path", "fork_rate", "wall_s")
    table = Table("model", *names, *(f"within {w}" for w in WINDOWS))
    for row in results["rows"]:
        table.add_row(
            row["method"],
            *(str(row[n]) for n in names),
            *(f"{row['within_context'][w]:.3f}" for w in WINDOWS),
        )
    console.print(table)
    for method, lines in results["by_difficulty"].items():
        by = Table(*lines[0], title=f"{method}, by difficulty")
        for line in lines:
            by.add_row(*map(str, line.values()))
        console.print(by)
    for name, value in results.items():
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
    add(
        "--sampled",
        type=Path,
        nargs=2,
        metavar="DIRECTORY",
        help="before and after reinforcement, with sampled replies",
    )
    add("-o", "--out", type=Path, help="a file for the plot")
    add("--json", action="store_true", help="one JSON object on stdout instead of tables")
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    rows = [load_first(d) for d in (options.sequential, options.parallel, options.rl) if d]
    results = report(rows[0], rows[1], rows[2] if len(rows) > 2 else None)
    if options.sampled:
        results["rl_sampled"] = reinforced(*map(load_first, options.sampled))
    if options.out:
        plot_methods(rows, options.out, "Countdown, the same held-out problems")
    return finish(results, missed(results), show, options)


if __name__ == "__main__":
    sys.exit(main())
