"""How many calls a vote that ends early saves, and whether it loses anything: paired with the complete vote, on Countdown.

python -m benchmarks.quality.early_votes [--model builtin] [--limit 200] [--n 16] [--at-once 16] [--ways beta,cges] [--json] [--check]

The model samples chains without forks. Each way answers the same held-out problems with the same seeds, so that an early vote has the
first chains of the complete one.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import sgl_apr as apr
from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware
from sgl_apr.evaluation.metrics import bootstrap_interval
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems, solves
from sgl_apr.evaluation.tasks.countdown.task import CountdownTask
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.runtime.branch_group import gather
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import locate_model

ALL, EARLY = "all chains", ("beta", "dirichlet", "cges")
WAYS: dict[str, dict[str, Any]] = {
    ALL: {},
    "beta": {"stop": "beta"},
    "dirichlet": {"stop": "dirichlet"},
    "cges": {"stop": "cges"},
}
BUDGET = apr.Budget(tokens=1_000_000)  # of calls alone
CALLS_SAVED = 0.4  # at least


async def answer_all(
    url: str,
    problems: Sequence[Problem],
    n: int,
    at_once: int,
    options: dict[str, Any],
    on_answer: Callable[[], None],
) -> list[MethodResult]:
    """The results of a vote on each problem, whose number is its seed."""
    gate = asyncio.Semaphore(at_once)
    async with await apr.HttpEngine.connect(url) as engine:
        task = CountdownTask(engine)

        async def answer(number: int, problem: Problem) -> MethodResult:
            async with gate:
                result = await method("self_consistency")(
                    engine, problem, task=task, n=n, budget=BUDGET, seed=number, **options
                )
            on_answer()
            return result

        return await gather(answer(number, problem) for number, problem in enumerate(problems))


def measure(
    url: str, problems: Sequence[Problem], n: int, at_once: int, ways: Sequence[str], progress: Progress
) -> list[dict[str, Any]]:
    """One row for each way, compared with the vote of all chains."""
    rows, complete = list[dict[str, Any]](), list[float]()
    bar = progress.add_task("votes", total=len(ways) * len(problems))
    for way in ways:
        progress.update(bar, description=way)
        began = time.monotonic()
        advance = partial(progress.advance, bar)
        results = asyncio.run(answer_all(url, problems, n, at_once, WAYS[way], advance))
        seconds = time.monotonic() - began
        correct = [float(solves(p, r.answer)) for p, r in zip(problems, results, strict=True)]
        complete = complete or correct
        differences = [own - other for own, other in zip(correct, complete, strict=True)]
        rows.append(
            {
                "way": way,
                "accuracy": fmean(correct),
                "accuracy_ci95": bootstrap_interval(correct),
                "difference": fmean(differences),
                "difference_ci95": bootstrap_interval(differences),
                "calls": fmean(sum(c.phase == "branch" for c in r.trajectory.calls) for r in results),
                "tokens": fmean(r.metrics.total for r in results),
                "seconds": seconds,
            }
        )
    for row in rows:
        row["calls_saved"] = 1 - row["calls"] / rows[0]["calls"]
    return rows


def show(result: dict[str, Any]) -> None:
    """Print a table for people."""
    table = Table("vote", "solved", "difference", "calls", "saved", "tokens", "seconds")
    for row in result["rows"]:
        low, high = row["difference_ci95"]
        table.add_row(
            row["way"], f"{row['accuracy']:.1%}", f"{row['difference']:+.1%} ({low:+.1%} to {high:+.1%})", f"{row['calls']:.1f}",
            f"{row['calls_saved']:.0%}", f"{row['tokens']:,.0f}", f"{row['seconds']:.1f}",
        )  # fmt: skip
    Console().print(table)


def missed_bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each early vote that saves too little, or loses."""
    missed = []
    for row in rows[1:]:
        if row["calls_saved"] < CALLS_SAVED:
            missed.append(
                f"{row['way']} saves {row['calls_saved']:.0%} of the calls, expected {CALLS_SAVED:.0%}"
            )
        if row["difference_ci95"][1] < 0:
            missed.append(f"{row['way']} solves {-row['difference']:.1%} fewer than all chains")
    return missed


def main() -> int:
    """Serve the model, and measure all ways."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin", help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=200, help="problems (default: %(default)s)")
    parser.add_argument("--n", type=int, default=16, help="chains of a complete vote (default: %(default)s)")
    parser.add_argument(
        "--at-once", type=int, default=16, help="problems at the same time (default: %(default)s)"
    )
    parser.add_argument(
        "--ways",
        default=",".join(EARLY),
        help="votes that end early, to compare with all chains (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    problems = list(generate_problems(options.limit, "test"))
    early = options.ways.split(",")
    if wrong := [way for way in early if way not in EARLY]:
        parser.error(f"--ways {wrong[0]!r}, expected some of {', '.join(EARLY)}")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        Server(locate_model(options.model), **SERVER_OPTIONS) as server,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        rows = measure(server.url, problems, options.n, options.at_once, [ALL, *early], progress)
    result = {
        "hardware": hardware(),
        "model": options.model,
        "problems": options.limit,
        "n": options.n,
        "rows": rows,
    }
    return finish(result, missed_bars(rows), show, options)


if __name__ == "__main__":
    sys.exit(main())
