"""Whether a model that is told how wide it may fork now answers sooner on a busy server.

python -m benchmarks.quality.width_under_load [--model builtin] [--dialect multiverse] [--limit 96] [--at-once 8,32] [--json]

Each client solves one held-out problem of four numbers after another, greedily, and all clients share one server with a small KV
cache. Three ways take turns on the same problems: the model forks as it likes; the runtime ends its forks at the width that the
load allows (`cap_width_by_load`); the prompt states that width (`affordable_width`).
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
from sgl_apr.evaluation.tasks.countdown.attempts import Attempt
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems
from sgl_apr.runtime.branch_group import gather
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import locate_model

WAYS = ("free", "cut", "told")
WIDTH, BRANCH_TOKENS = 8, 160
BUDGET = apr.Budget(tokens=6000, width=WIDTH, branch_tokens=BRANCH_TOKENS)
# Room for about two unlimited replies at once, so that the width matters.
SERVER_OPTIONS: dict[str, Any] = {"max_total_tokens": 16384, "stream_interval": 32}


async def answer(engine: apr.HttpEngine, problem: Problem, way: str, dialect: str) -> tuple[Attempt, float]:
    """Solve a problem in one of three ways. Returns the attempt and its seconds."""
    began = time.monotonic()
    width = await apr.affordable_width(engine, WIDTH, BRANCH_TOKENS) if way == "told" else None
    # A fork has at least two branches.
    prompt = problem.prompt(width and max(2, width))
    trajectory = await apr.areason(
        engine, prompt, dialect, budget=BUDGET, temperature=0.0, cap_width_by_load=way == "cut"
    )
    return Attempt(problem, trajectory), time.monotonic() - began


async def measure(
    engine: apr.HttpEngine, dialect: str, problems: Sequence[Problem], at_once: int, way: str
) -> dict[str, Any]:
    """The figures of one way with some problems at once."""
    gate = asyncio.Semaphore(at_once)

    async def next_answer(problem: Problem) -> tuple[Attempt, float]:
        async with gate:
            return await answer(engine, problem, way, dialect)

    began = time.monotonic()
    answers = await gather(map(next_answer, problems))
    correct = [float(attempt.correct) for attempt, _ in answers]
    metrics = [attempt.trajectory.metrics() for attempt, _ in answers]
    forks = [len(block.branches) for attempt, _ in answers for block in attempt.trajectory.blocks]
    return {
        "way": way,
        "at_once": at_once,
        "count": len(answers),
        "width": fmean(forks or [0]),
        "accuracy": fmean(correct),
        "accuracy_ci95": bootstrap_interval(correct),
        "tokens": fmean(m.total for m in metrics),
        "median_s": median(seconds for _, seconds in answers),
        "answers_per_s": len(answers) / (time.monotonic() - began),
    }


def show(result: dict[str, Any]) -> None:
    """Print a table for people."""
    table = Table("at once", "forks are", "width", "accuracy", "tokens", "seconds (median)", "answers/s")
    for row in result["rows"]:
        low, high = row["accuracy_ci95"]
        table.add_row(
            str(row["at_once"]), row["way"], f"{row['width']:.1f}", f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})",
            f"{row['tokens']:.0f}", f"{row['median_s']:.2f}", f"{row['answers_per_s']:.1f}",
        )  # fmt: skip
    Console().print(table)


def main() -> int:
    """Measure all ways under each load."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin", help="default: %(default)s")
    parser.add_argument("--dialect", default="multiverse", help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=96, help="problems (default: %(default)s)")
    parser.add_argument("--at-once", default="8,32", help="clients (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    problems = list(generate_problems(options.limit, "test", numbers=(4,)))
    loads = [*map(int, options.at_once.split(","))]

    async def measure_all(url: str) -> list[dict[str, Any]]:
        async with await apr.HttpEngine.connect(
            url
        ) as engine:  # one client, which knows the steps of the engine
            await measure(engine, options.dialect, problems[:16], 16, "free")  # warm up
            return [
                await measure(engine, options.dialect, problems, at_once, way)
                for at_once in loads
                for way in WAYS
            ]

    with Server(locate_model(options.model), **SERVER_OPTIONS) as server:
        rows = asyncio.run(measure_all(server.url))
    busiest = {row["way"]: row for row in rows if row["at_once"] == max(each["at_once"] for each in rows)}
    missed = []
    if busiest["told"]["median_s"] >= busiest["free"]["median_s"]:
        missed.append("the model that is told a width does not answer sooner on the busiest server")
    if busiest["told"]["accuracy"] < busiest["cut"]["accuracy"]:
        missed.append(
            "the model that is told a width solves less than one that is cut, on the busiest server"
        )
    return finish({"hardware": hardware(), "model": options.model, "rows": rows}, missed, show, options)


if __name__ == "__main__":
    sys.exit(main())
