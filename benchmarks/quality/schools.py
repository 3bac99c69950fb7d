"""Text joins against KV joins against messages: models of one recipe, each also under the join that it was not trained for.

python -m benchmarks.quality.schools [-d runs/schools] [--results benchmarks/results/schools] [--limit 200] [--json] [-o schools.png]

The directory holds one run for each format and seed, named FORMAT-SEED, as docs/schools.md says how to train them. All models answer the same
held-out problems, greedily. What each model did is kept in a file of the results, so that models can be trained and measured one after
another: one that has a file is not measured again. Intervals of the accuracy are over problems within a seed; `seeds` lists the accuracy
of each seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
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
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems
from sgl_apr.formats.dialects import Dialect, dialect
from sgl_apr.formats.grammar_source import grammar_path
from sgl_apr.formats.options import JoinMethod
from sgl_apr.server.launch.launcher import Server

SEQUENTIAL = "sequential"
FIGURES = (
    "accuracy", "fork_rate", "tokens", "critical_path", "longest_context", "reprefilled_tokens", "wall_s",
)  # fmt: skip
RESULTS = Path("benchmarks/results/schools")
RUN = re.compile(r"([a-z_0-9]+)-(\d+)")


@dataclass(frozen=True, slots=True)
class School:
    """A model under a join.

    Attributes:
        name: The format that the model was trained on.
        dialect: The format that it decodes in; the join may be one that its grammar file does not list.
        join: How its blocks join; None without forks.
        is_native: Whether it was trained for this join.
    """

    name: str
    dialect: Dialect
    join: JoinMethod | None
    is_native: bool


def schools(name: str) -> list[School]:
    """The joins under which a model of a format is measured, its own first."""
    if name == SEQUENTIAL:
        return [School(name, dialect("spawn"), None, True)]
    form = dialect(name)
    if form.branch_context == "message":
        return [School(name, form, "message", True)]
    both = form if "kv" in form.joins else Dialect.from_file(grammar_path(name), joins=("text", "kv"))
    own: JoinMethod = form.published_join
    other: JoinMethod = "kv" if own == "text" else "text"
    return [School(name, both, own, True), School(name, both, other, False)]


def runs(directory: Path) -> list[Path]:
    """The runs of a directory that have a model, such as multiverse-0."""
    return [path.parent for path in sorted(directory.glob("*/model")) if RUN.fullmatch(path.parent.name)]


async def attempt(url: str, school: School, problems: Sequence[Problem], at_once: int) -> list[Attempt]:
    """Attempt all problems with one model under one join."""
    async with await HttpEngine.connect(url) as engine:
        mode: Any = "sequential" if school.join is None else "auto"
        return await attempt_problems(
            engine, problems, school.dialect, at_once=at_once, budget=BUDGET, join=school.join, mode=mode,
            temperature=0.0,
        )  # fmt: skip


def figures(attempts: Sequence[Attempt], seconds: float) -> dict[str, float]:
    """Means over the attempts."""
    metrics = [a.trajectory.metrics() for a in attempts]
    means = (
        fmean(a.correct for a in attempts),
        fmean(m.blocks > 0 for m in metrics),
        fmean(m.total for m in metrics),
        fmean(m.critical_path for m in metrics),
        fmean(m.longest_context for m in metrics),
        fmean(m.reprefilled_tokens for m in metrics),
        seconds,
    )
    return dict(zip(FIGURES, means, strict=True))


def measure(run: Path, problems: Sequence[Problem], at_once: int) -> dict[str, Any]:
    """What one model does under each join.

    Args:
        run: The run that trained it, such as multiverse-0.
        problems: What it answers.
        at_once: How many problems at the same time.

    Returns:
        For a file of the results: the machine, and for each join the figures and which problems are solved.
    """
    match = RUN.fullmatch(run.name)
    assert match
    rows = []
    with Server(run / "model", **SERVER_OPTIONS) as server:
        for school in schools(match[1]):
            began = time.monotonic()
            attempts = asyncio.run(attempt(server.url, school, problems, at_once))
            seconds = time.monotonic() - began
            rows.append(
                {"join": school.join, "trained_for_it": school.is_native}
                | figures(attempts, seconds)
                | {"solved": "".join(str(int(one.correct)) for one in attempts)}
            )
    return {
        "format": match[1],
        "seed": int(match[2]),
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "problems": len(problems),
        "rows": rows,
    }


def read_results(directory: Path, count: int) -> list[dict[str, Any]]:
    """The results of all models that have answered so many problems, those of a format together."""
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    return [one for one in found if one["problems"] == count]


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each format and join: means over the seeds."""
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for result in results:
        for row in result["rows"]:
            groups.setdefault((result["format"], row["join"]), []).append(row)
    rows = []
    for (name, join), seeds in groups.items():
        solved = [fmean(map(int, each)) for each in zip(*(row["solved"] for row in seeds), strict=True)]
        rows.append(
            {"format": name, "join": join, "trained_for_it": seeds[0]["trained_for_it"]}
            | {key: fmean(row[key] for row in seeds) for key in FIGURES}
            | {"accuracy_ci95": bootstrap_interval(solved), "seeds": [row["accuracy"] for row in seeds]}
        )
    return rows


def show(result: dict[str, Any]) -> None:
    """Print a table for people."""
    table = Table(
        "format",
        "join",
        "accuracy",
        "of each seed",
        "forked",
        "tokens",
        "critical path",
        "context",
        "read again",
        "seconds",
    )
    for row in result["rows"]:
        low, high = row["accuracy_ci95"]
        join = (row["join"] or "none") + ("" if row["trained_for_it"] else ", untrained")
        table.add_row(
            row["format"], join, f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})",
            " ".join(f"{one:.1%}" for one in row["seeds"]), f"{row['fork_rate']:.0%}", f"{row['tokens']:.0f}",
            f"{row['critical_path']:.0f}", f"{row['longest_context']:.0f}", f"{row['reprefilled_tokens']:.0f}",
            f"{row['wall_s']:.1f}",
        )  # fmt: skip
    Console().print(table)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy over the critical path, one point for each format and join."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    for row in rows:
        low, high = row["accuracy_ci95"]
        label = f"{row['format']}, {row['join'] or 'no join'}" + (
            "" if row["trained_for_it"] else " (untrained)"
        )
        error = [[row["accuracy"] - low], [high - row["accuracy"]]]
        marker = "o" if row["trained_for_it"] else "x"
        axes.errorbar(row["critical_path"], row["accuracy"], yerr=error, fmt=marker, capsize=3, label=label)
    axes.set_xlabel("critical path (tokens)")
    axes.set_ylabel("solved")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=160)


def main() -> int:
    """Measure all models of a directory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-d", "--directory", type=Path, default=Path("runs/schools"), help="default: %(default)s"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=200, help="problems (default: %(default)s)")
    parser.add_argument(
        "--at-once", type=int, default=16, help="problems at the same time (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("-o", "--out", type=Path, help="a figure")
    options = parser.parse_args()
    problems = list(generate_problems(options.limit, "test"))
    options.results.mkdir(parents=True, exist_ok=True)
    for run in runs(options.directory):
        path = options.results / f"{run.name}.json"
        if not path.exists() or json.loads(path.read_text())["problems"] != options.limit:
            Console(stderr=True).print(f"{run.name} answers {options.limit} problems")
            path.write_text(json.dumps(measure(run, problems, options.at_once), indent=1) + "\n")
    results = read_results(options.results, options.limit)
    if not results:
        parser.error(
            f"{options.directory} has no runs such as multiverse-0/model: docs/schools.md says how to train them"
        )
    rows = summarize(results)
    if options.out:
        plot(rows, options.out)
    machines = sorted({one["hardware"]["cpu"] for one in results})
    result = {"hardware": hardware(), "measured_on": machines, "problems": options.limit, "rows": rows}
    return finish(result, [], show, options)


if __name__ == "__main__":
    sys.exit(main())
