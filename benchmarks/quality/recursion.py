"""A model whose branches fork again against a flat one, on problems that are too wide for one level of forks.

python -m benchmarks.quality.recursion --recursive runs/recursion/model --flat runs/recursion-flat/model [--limit 100] [--json]

Both come from one model by the same recipe (configs/countdown-recursion.toml). They answer the same held-out problems of three to
six numbers, greedily, under several limits of total tokens, and under several limits of the critical path. Problems of six numbers
were not in the training data.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

import sgl_apr as apr
from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware
from sgl_apr.evaluation.metrics import bootstrap_interval
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS, Attempt, attempt_problems
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems
from sgl_apr.server.launch.launcher import Server

SIZES = (3, 4, 5, 6)
TOKENS, CRITICAL_PATHS = (2_000, 6_000, 18_000), (500, 1_000, 2_000)
UNLIMITED = apr.Budget(tokens=40_000, width=16, branch_tokens=4_000)
DIALECT = "spawn"


def budgets(depth: int) -> dict[str, apr.Budget]:
    """The budgets by name, for a model that nests so deep."""
    free = replace(UNLIMITED, depth=depth)
    return (
        {"free": free}
        | {f"tokens {n:,}": replace(free, tokens=n) for n in TOKENS}
        | {f"critical path {n:,}": replace(free, critical_tokens=n) for n in CRITICAL_PATHS}
    )


async def attempt(url: str, problems: Sequence[Problem], budget: apr.Budget) -> list[Attempt]:
    """Attempt all problems, greedily."""
    async with await apr.HttpEngine.connect(url) as engine:
        return await attempt_problems(engine, problems, DIALECT, at_once=16, budget=budget, temperature=0.0)


def measure(models: dict[str, tuple[Path, int]], count: int) -> list[dict[str, Any]]:
    """One row for each model, size and budget; sizes that fork once or never have the budget "free" alone."""
    rows = []
    for name, (model, depth) in models.items():
        with Server(model, **SERVER_OPTIONS) as server:
            for size in SIZES:
                problems = list(generate_problems(count, "test", numbers=(size,)))
                for limit, budget in budgets(depth).items():
                    if limit == "free" or size > 4:
                        attempts = asyncio.run(attempt(server.url, problems, budget))
                        rows.append({"model": name, "numbers": size, "limit": limit} | figures(attempts))
    return rows


def figures(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Means over the attempts."""
    correct = [float(a.correct) for a in attempts]
    metrics = [a.trajectory.metrics() for a in attempts]
    return {
        "count": len(attempts),
        "accuracy": fmean(correct),
        "accuracy_ci95": bootstrap_interval(correct),
        "depth": fmean(
            max((len(block.path) // 2 + 1 for block in a.trajectory.blocks), default=0) for a in attempts
        ),
        "tokens": fmean(m.total for m in metrics),
        "critical_path": fmean(m.critical_path for m in metrics),
        "longest_context": fmean(m.longest_context for m in metrics),
    }


def show(result: dict[str, Any]) -> None:
    """Print a table for people."""
    table = Table("model", "numbers", "limit", "accuracy", "depth", "tokens", "critical path", "context")
    for row in result["rows"]:
        low, high = row["accuracy_ci95"]
        table.add_row(
            row["model"], str(row["numbers"]), row["limit"], f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})",
            f"{row['depth']:.2f}", f"{row['tokens']:,.0f}", f"{row['critical_path']:,.0f}", f"{row['longest_context']:,.0f}",
        )  # fmt: skip
    Console().print(table)


def main() -> int:
    """Measure both models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recursive", type=Path, default=Path("runs/recursion/model"))
    parser.add_argument("--flat", type=Path, default=Path("runs/recursion-flat/model"))
    parser.add_argument("--limit", type=int, default=100, help="problems of each size (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    models = {"recursive": (options.recursive, 2), "flat": (options.flat, 1)}
    rows = measure(models, options.limit)
    return finish({"hardware": hardware(), "rows": rows}, [], show, options)


if __name__ == "__main__":
    sys.exit(main())
