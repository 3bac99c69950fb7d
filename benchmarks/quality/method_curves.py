"""Every method at equal budgets of tokens and at equal deadlines, on the same held-out Countdown problems, as curves.

python -m benchmarks.quality.method_curves [--model builtin] [--limit 50] [--timed-limit 10] [--methods all] [-d runs/method-curves] [-o curves.svg] [--json] [--check]

It is `sgl-apr eval --sweep` with `sgl-apr plot`: an evaluation that was interrupted continues in its directory, and `sgl-apr report` shows it.
Deadlines are measured with one problem at a time, and fewer of them. The check: `pro` is within its interval of the best method at every budget of tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware
from sgl_apr.cli.main import main as sgl_apr
from sgl_apr.methods.registry import METHOD_MODULES

TOKENS = "tokens=256,512,1024,2048,4096,8192"
SECONDS = "seconds=2,4,8,16"
CHOOSES = "pro"


def evaluate(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The summaries of all levels, as `sgl-apr eval --json` prints them."""
    summaries = []
    for level in options.sweep:
        limit = options.timed_limit if level.startswith("seconds=") else options.limit
        argv = ["eval", "countdown", "--model", options.model, "--methods", options.methods, "--limit", str(limit)]  # fmt: skip
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            sgl_apr([*argv, "--sweep", level, "-o", str(options.directory), "--json"])
        found = json.loads(printed.getvalue())
        summaries += found.get("tasks", [found])
    return summaries


def rows(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each level and method."""
    return [
        {
            "limit": summary["limit"],
            "value": summary["value"],
            **{
                name: row.get(name)
                for name in ("method", "accuracy", "ci95", "total_tokens", "critical_path")
            },
            **{name: row.get(name) for name in ("took_s", "engine_calls", "cached_share", "label", "reason")},
            "compared_with_best": compared.get(row["method"]),
        }
        for summary in summaries
        for compared in [{each["method"]: each for each in summary["compared_with_best"]}]
        for row in summary["rows"]
    ]


def missed_bars(found: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each budget at which another method solves significantly more than the one that chooses."""
    return [
        f"at {row['value']:g} tokens {compared['best']} solves {-compared['difference']:.1%} more than {CHOOSES}"
        for row in found
        if row["method"] == CHOOSES and row["limit"] == "tokens" and (compared := row["compared_with_best"])
        if compared["ci95"][1] < 0
    ]


def show(result: dict[str, Any]) -> None:
    """Print a table for people: accuracy by method and level."""
    levels = list(dict.fromkeys((row["limit"], row["value"]) for row in result["rows"]))
    table = Table("method", *(f"{limit}={value:g}" for limit, value in levels))
    by_method: dict[str, dict[tuple[str, float], str]] = {}
    for row in result["rows"]:
        text = "-" if row["accuracy"] is None else f"{row['accuracy']:.0%}"
        by_method.setdefault(row["method"], {})[row["limit"], row["value"]] = text
    for name, cells in by_method.items():
        table.add_row(name, *(cells.get(level, "") for level in levels))
    Console().print(table)


def main() -> int:
    """Evaluate all methods at all levels, and draw the curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin", help="default: %(default)s")
    parser.add_argument(
        "--methods", default="all", help=f"some of {', '.join(METHOD_MODULES)} (default: all)"
    )
    parser.add_argument("--limit", type=int, default=50, help="problems (default: %(default)s)")
    parser.add_argument(
        "--timed-limit", type=int, default=10, help="problems of each deadline (default: %(default)s)"
    )
    parser.add_argument(
        "--sweep", action="append", metavar="LIMIT=N,...", help=f"default: {TOKENS} and {SECONDS}"
    )
    parser.add_argument(
        "-d", "--directory", type=Path, default=Path("runs/method-curves"), help="default: %(default)s"
    )
    parser.add_argument("-o", "--out", type=Path, help="a figure")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    options.sweep = options.sweep or [TOKENS, SECONDS]
    found = rows(evaluate(options))
    if options.out:
        with contextlib.redirect_stdout(sys.stderr):
            sgl_apr(["plot", str(options.directory), "-o", str(options.out)])
    result = {
        "hardware": hardware(),
        "model": options.model,
        "problems": options.limit,
        "timed_problems": options.timed_limit,
        "rows": found,
    }
    return finish(result, missed_bars(found), show, options)


if __name__ == "__main__":
    sys.exit(main())
