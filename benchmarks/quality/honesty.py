"""What a Countdown model claims where there is no solution, and what it solves at sizes that it was trained on or not.

python -m benchmarks.quality.honesty [MODEL ...] [--methods apr,threadweaver] [--limit 200] [--json] [--check]

Each MODEL is a checkpoint or a name that `sgl-apr model` knows. All problems are held out. Problems of two to four numbers are in
the distribution of the training data, with and without a solution, and problems of five numbers are not.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware
from sgl_apr.evaluation.benchmarks.registry import benchmark
from sgl_apr.evaluation.metrics import MethodResults, bootstrap_interval
from sgl_apr.evaluation.runner import evaluate
from sgl_apr.evaluation.store import ResultStore
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS
from sgl_apr.methods.registry import method
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import locate_model

VARIANTS = {  # whether the training data have such problems
    "countdown": True, "countdown:2": True, "countdown:5": False, "countdown:unsolvable": True,
    "countdown:5,unsolvable": False,
}  # fmt: skip
LIMITS = {
    "countdown:2": 40,
    "countdown:5": 50,
    "countdown:5,unsolvable": 50,
}  # of two numbers there are hardly more
FALSE_CLAIMS = 0.05  # of problems without a solution, at most


def measure(url: str, method_name: str, limit: int) -> list[dict[str, Any]]:
    """One row for each kind of problem."""
    rows = []
    for name, is_trained in VARIANTS.items():
        task = benchmark(name, min(limit, LIMITS.get(name, limit)))
        options: dict[str, Any] = {"budget": task.budget, "temperature": 0.0}
        found = asyncio.run(evaluate(url, task, method_name, ResultStore(), **options))
        rows.append(
            {"problems": name, "in_distribution": is_trained, "method": method_name} | _figures(found)
        )
    return rows


def _figures(found: MethodResults) -> dict[str, Any]:
    if not found.attempts:
        return {"count": 0, "reason": found.reason}
    false = [float(bool(a.is_false_claim)) for a in found.attempts]
    return {
        "count": len(found.attempts),
        "accuracy": found.accuracy,
        "accuracy_ci95": found.ci95,
        "claim_precision": found.claim_precision,
        "false_claims": sum(false) / len(false),
        "false_claims_ci95": bootstrap_interval(false),
        "tokens": found.mean(lambda a: a.tokens),
    }


def show(result: dict[str, Any]) -> None:
    """Print a table for people."""
    columns = (
        "model",
        "method",
        "problems",
        "trained on",
        "accuracy",
        "claims right",
        "false claims",
        "tokens",
    )
    table = Table(*columns)
    for row in result["rows"]:
        if not row["count"]:
            table.add_row(row["model"], row["method"], row["problems"], "", row["reason"])
            continue
        low, high = row["accuracy_ci95"]
        precision = row["claim_precision"]
        table.add_row(
            row["model"], row["method"], row["problems"], "yes" if row["in_distribution"] else "no",
            f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})", "-" if precision is None else f"{precision:.1%}",
            f"{row['false_claims']:.1%}", f"{row['tokens']:.0f}",
        )  # fmt: skip
    Console().print(table)


def main() -> int:
    """Serve each model in turn, and print the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["builtin"], metavar="MODEL")
    parser.add_argument("--methods", default="multiverse,apr", help="adaptive formats (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=200, help="problems of each kind (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    rows = []
    methods = options.methods.split(",")
    for name in methods:
        method(name)  # an unknown one is an error before anything starts
    for model in options.models:
        with Server(locate_model(model), **SERVER_OPTIONS) as server:
            for name in methods:
                rows += [{"model": model} | row for row in measure(server.url, name, options.limit)]
    missed = [
        f"{row['model']}, {row['method']}: {row['false_claims']:.1%} of {row['problems']} have a false claim, "
        f"expected at most {FALSE_CLAIMS:.0%}"
        for row in rows
        if "unsolvable" in row["problems"] and row["in_distribution"] and row["false_claims"] > FALSE_CLAIMS
    ]
    return finish({"hardware": hardware(), "rows": rows}, missed, show, options)


if __name__ == "__main__":
    sys.exit(main())
