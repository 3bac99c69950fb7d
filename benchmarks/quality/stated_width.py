"""Whether the forks of a Countdown model are as wide as its prompt states.

python -m benchmarks.quality.stated_width [MODEL ...] [--dialects multiverse,spawn] [--limit 50] [--temperature 0] [--json] [--check]

Each MODEL is a checkpoint or a name that `sgl-apr model` knows. The problems are held out, have four numbers and at least as many
first steps as the widest fork has branches. A reply counts as exact if its first fork has the stated width. At each width the same
problems are also solved without a stated one, by forks that the runtime ends at that width.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware
from sgl_apr.engine.http import HttpEngine
from sgl_apr.evaluation.benchmarks.games import BUDGET
from sgl_apr.evaluation.metrics import bootstrap_interval
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS, Attempt, attempt_problems
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems, legal_steps
from sgl_apr.formats.dialects import dialect
from sgl_apr.formats.presets import known_dialects
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import locate_model

WIDTHS = range(2, 9)
EXACT = 0.95  # of the replies at each width, at least


def problems(count: int) -> list[Problem]:
    """Held-out problems on which a fork of every width is possible."""
    every = generate_problems(4 * count, "test", numbers=(4,))
    return list(islice((p for p in every if len(legal_steps(p.numbers)) >= max(WIDTHS)), count))


async def attempt(
    engine: HttpEngine, name: str, count: int, temperature: float, *, stated: int | None, width: int
) -> list[Attempt]:
    """Solve the problems with a width in the prompt, and one that the runtime enforces."""
    budget = replace(BUDGET, width=width)
    return await attempt_problems(
        engine, problems(count), name, width=stated, budget=budget, temperature=temperature
    )


async def measure(
    url: str, names: Sequence[str] | None, count: int, temperature: float
) -> list[dict[str, Any]]:
    """One row for each dialect without a width, and two for each width: stated, and cut."""
    rows = []
    async with await HttpEngine.connect(url) as engine:
        for name in names or [
            each.name for each in known_dialects(engine.tokenizer) if not each.unlabelled_branches
        ]:
            widest = min(dialect(name).max_width, BUDGET.width or dialect(name).max_width)
            free = await attempt(engine, name, count, temperature, stated=None, width=widest)
            rows.append({"dialect": name, "width": None, "way": "free"} | _figures(free, None))
            for width in (width for width in WIDTHS if width <= widest):
                told = await attempt(engine, name, count, temperature, stated=width, width=widest)
                cut = await attempt(engine, name, count, temperature, stated=None, width=width)
                better = [float(a.correct) - float(b.correct) for a, b in zip(told, cut, strict=True)]
                gain = {"gain": fmean(better), "gain_ci95": bootstrap_interval(better)}
                rows.append({"dialect": name, "width": width, "way": "stated"} | _figures(told, width) | gain)
                rows.append({"dialect": name, "width": width, "way": "cut"} | _figures(cut, width))
    return rows


def _figures(attempts: Sequence[Attempt], width: int | None) -> dict[str, Any]:
    first = [len(a.trajectory.blocks[0].branches) if a.trajectory.blocks else 0 for a in attempts]
    exact = [float(branches == width) for branches in first]
    correct = [float(a.correct) for a in attempts]
    return {
        "count": len(attempts),
        "exact": None if width is None else fmean(exact),
        "branches": fmean(first),
        "accuracy": fmean(correct),
        "accuracy_ci95": bootstrap_interval(correct),
        "tokens": fmean(a.trajectory.metrics().total for a in attempts),
        "critical_path": fmean(a.trajectory.metrics().critical_path for a in attempts),
    }


def show(result: dict[str, Any]) -> None:
    """Print a table for people."""
    table = Table(
        "model", "dialect", "width", "forks are", "exact", "branches", "accuracy", "tokens", "critical path"
    )
    for row in result["rows"]:
        low, high = row["accuracy_ci95"]
        table.add_row(
            row["model"], row["dialect"], str(row["width"] or "none"), row["way"],
            "-" if row["exact"] is None else f"{row['exact']:.0%}", f"{row['branches']:.1f}",
            f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})", f"{row['tokens']:.0f}", f"{row['critical_path']:.0f}",
        )  # fmt: skip
    Console().print(table)


def main() -> int:
    """Serve each model in turn, and print the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["builtin"], metavar="MODEL")
    parser.add_argument(
        "--dialects", help="by default those that the model knows and whose branches have outlines"
    )
    parser.add_argument("--limit", type=int, default=50, help="problems (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: %(default)s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    names = options.dialects and options.dialects.split(",")
    rows = []
    for model in options.models:
        with Server(locate_model(model), **SERVER_OPTIONS) as server:
            found = asyncio.run(measure(server.url, names, options.limit, options.temperature))
        rows += [{"model": model} | row for row in found]
    missed = []
    for row in (row for row in rows if row["way"] == "stated"):
        where = f"{row['model']}, {row['dialect']}, width {row['width']}"
        if row["exact"] < EXACT:
            missed.append(
                f"{where}: {row['exact']:.0%} of the replies have it, expected at least {EXACT:.0%}"
            )
        if row["gain_ci95"][1] < 0:
            missed.append(f"{where}: {-row['gain']:.0%} fewer solved than by forks that are cut there")
    result = {"hardware": hardware(), "temperature": options.temperature, "rows": rows}
    return finish(result, missed, show, options)


if __name__ == "__main__":
    sys.exit(main())
