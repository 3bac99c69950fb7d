"""Whether speculative expansion makes a tree search faster at the same answers: spex against tree_of_thoughts, on Countdown.

python -m benchmarks.quality.speculative_search [--model builtin:spawn] [--limit 30] [--json] [--check]

Both search the same held-out problems of four numbers with the same seeds, one at a time and taking turns, so that a problem's two times are
measured under the same conditions. The trees are narrow (--breadth, --proposals, --evaluations): speculation uses what an engine has free, and a wide
tree leaves nothing of two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

import sgl_apr as apr
from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware
from sgl_apr.evaluation.metrics import bootstrap_interval
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems, solves
from sgl_apr.evaluation.tasks.countdown.task import CountdownTask
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.spex import LIMIT
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import locate_model

METHODS = ("tree_of_thoughts", "spex")
BUDGET = apr.Budget(tokens=1_000_000)  # none that matters
SPEEDUP = 1.2  # at least
TREE = {"breadth": 2, "proposals": 1, "evaluations": 1}


async def measure(
    url: str, problems: Sequence[Problem], tree: dict[str, int]
) -> list[dict[str, tuple[MethodResult, float]]]:
    """For each problem, the result and the seconds of both methods, the first of which alternates."""
    measured = []
    async with await apr.HttpEngine.connect(url) as engine:
        task = CountdownTask(engine)
        for number, problem in enumerate(problems):
            pair = {}
            for name in METHODS if number % 2 else METHODS[::-1]:
                began = time.monotonic()
                result = await method(name)(engine, problem, task=task, budget=BUDGET, seed=number, **tree)
                pair[name] = result, time.monotonic() - began
            measured.append(pair)
    return measured


def summary(
    problems: Sequence[Problem], pairs: Sequence[dict[str, tuple[MethodResult, float]]]
) -> dict[str, Any]:
    """The figures of both methods, and the ratio of their times."""
    rows = [
        {
            "method": name,
            "accuracy": fmean(
                solves(p, pair[name][0].answer) for p, pair in zip(problems, pairs, strict=True)
            ),
            "tokens": fmean(pair[name][0].metrics.total for pair in pairs),
            "calls": fmean(pair[name][0].metrics.engine_calls for pair in pairs),
            "median_s": median(pair[name][1] for pair in pairs),
            "cut": fmean(
                sum(hit.limit == LIMIT for hit in pair[name][0].trajectory.limits) for pair in pairs
            ),
        }
        for name in METHODS
    ]
    plain, speculative = METHODS
    ratios = [pair[plain][1] / pair[speculative][1] for pair in pairs]
    return {
        "rows": rows,
        "speedup": median(ratios),
        "mean_speedup": fmean(ratios),
        "mean_speedup_ci95": bootstrap_interval(ratios),
        "same_answers": fmean(pair[plain][0].answer == pair[speculative][0].answer for pair in pairs),
    }


def show(result: dict[str, Any]) -> None:
    """Print a table for people."""
    table = Table("method", "solved", "tokens", "calls", "cut", "seconds (median)")
    for row in result["rows"]:
        table.add_row(
            row["method"], f"{row['accuracy']:.0%}", f"{row['tokens']:,.0f}", f"{row['calls']:.0f}", f"{row['cut']:.1f}", f"{row['median_s']:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"{result['speedup']:.2f} times faster (median), same answer for {result['same_answers']:.0%}"
    )


def main() -> int:
    """Serve the model, and measure both methods."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin:spawn", help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=30, help="problems (default: %(default)s)")
    for name, default in TREE.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{name} of the tree (default: {default})"
        )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    tree = {name: getattr(options, name) for name in TREE}
    problems = list(generate_problems(options.limit, "test", numbers=(4,)))
    with Server(locate_model(options.model), **SERVER_OPTIONS) as server:
        pairs = asyncio.run(measure(server.url, problems, tree))
    result = {
        "hardware": hardware(),
        "model": options.model,
        "problems": options.limit,
        **tree,
        **summary(problems, pairs),
    }
    missed = []
    if result["speedup"] < SPEEDUP:
        missed.append(f"spex is {result['speedup']:.2f} times faster, expected {SPEEDUP}")
    return finish(result, missed, show, options)


if __name__ == "__main__":
    sys.exit(main())
