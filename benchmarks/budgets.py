"""What methods solve under small budgets of tokens: the built-in model on held-out Countdown problems.

python -m benchmarks.budgets [--json] [--check] [--tokens 256,512] [--methods apr,mcts] [-o DIR]
python -m benchmarks.budgets --split train --methods apr --leases 64:16,32:8     # how the constants were chosen
python -m benchmarks.budgets --methods apr --equal-shares                        # without leases, for comparison

`apr` is the adaptive method: the model decides when to fork, where the budget pays for that. `apr:auto` is `apr` with
mode="auto": forks at any budget. `pro` chooses a method. The others have a fixed structure. Each runs with the
temperature of its paper, a single reply with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import sgl_apr as apr
from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware, versions
from sgl_apr.evaluation.benchmarks.base import Benchmark
from sgl_apr.evaluation.benchmarks.games import countdown
from sgl_apr.evaluation.metrics import MethodResults, compare_methods
from sgl_apr.evaluation.runner import TIMEOUT_S, run_attempts
from sgl_apr.evaluation.store import open_evaluation
from sgl_apr.runtime import lease_pool, usage
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import locate_model

TOKENS = (256, 512, 1024, 2048, 4096)
FORCED = "apr:auto"  # the model may fork at any budget
METHODS = ("apr", FORCED, "pro", "sequential", "self_consistency", "best_of_n", "graph_of_thoughts", "mcts")
ADAPTIVE, GREEDY = "apr", ("apr", FORCED, "sequential")
BAR_TOKENS, BAR_ACCURACY = 1024, 0.8
Constants = tuple[int, int, int]  # FIRST_LEASE, NEXT_LEASE, FIRST_BRANCH_TOKENS


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, help="budgets (default: 256 to 4096)")
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), default=METHODS, help="methods to run"
    )
    parser.add_argument("--model", default="builtin", help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=200, help="problems (default: 200)")
    parser.add_argument("--split", choices=["test", "train"], default="test", help="problems of which split")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems")
    parser.add_argument("--at-once", type=int, default=128, help="problems under way at the same time")
    parser.add_argument(
        "--leases",
        type=lambda text: [numbers(one, ":") for one in text.split(",")],
        default=[()],
        metavar="FIRST:NEXT:PRIOR,...",
        help="try other constants: FIRST_LEASE, NEXT_LEASE and FIRST_BRANCH_TOKENS",
    )
    parser.add_argument("--equal-shares", action="store_true", help="fixed equal shares, as without leases")
    parser.add_argument(
        "-o", "--out", type=Path, help="keep the trajectories in this directory, and continue there"
    )
    return parser.parse_args(argv)


def numbers(text: str, separator: str = ",") -> tuple[int, ...]:
    """Numbers that are separated by commas."""
    return tuple(map(int, text.split(separator)))


@contextmanager
def constants(values: tuple[int, ...]) -> Iterator[Constants]:
    """Use these constants, the first ones that are given, and the package's own for the others."""
    own = (lease_pool.FIRST_LEASE, lease_pool.NEXT_LEASE, usage.FIRST_BRANCH_TOKENS)
    first, following, prior = (*values, *own[len(values) :])
    with (
        patch.object(lease_pool, "FIRST_LEASE", first),
        patch.object(lease_pool, "NEXT_LEASE", following),
        patch.object(usage, "FIRST_BRANCH_TOKENS", prior),
    ):
        yield first, following, prior


async def measure(
    engine: apr.HttpEngine, problems: Benchmark, options: argparse.Namespace, progress: Progress
) -> list[dict[str, Any]]:
    """One row for each budget, method and choice of constants."""
    rows = []
    steps = len(options.tokens) * len(options.methods) * len(options.leases)
    bar = progress.add_task("attempts", total=steps * len(problems.cases))
    for tokens in options.tokens:
        for values in options.leases:
            with constants(values) as used:
                results = {}
                for method in options.methods:
                    progress.update(bar, description=f"{tokens} tokens, {method}")
                    name = "-".join(map(str, (tokens, *(used if values else ()))))
                    settings = {
                        "model": options.model, "task": problems.name, "split": options.split, "limit": options.limit, "seed": options.seed,
                        "budget": {"tokens": tokens}, "constants": used, "equal_shares": options.equal_shares,
                    }  # fmt: skip
                    extra: dict[str, Any] = {"temperature": 0.0} if method in GREEDY else {}
                    if method == FORCED:
                        extra |= {"implementation": "apr", "mode": "auto"}
                    elif method == "pro":
                        extra["single_temperature"] = 0.0
                    with open_evaluation(options.out and options.out / name, settings) as store:
                        results[method] = await run_attempts(
                            engine, problems, method, store, at_once=options.at_once,
                            on_attempt=lambda: progress.advance(bar), budget=apr.Budget(tokens=tokens), seed=options.seed,
                            **extra,
                        )  # fmt: skip
                rows += [row(tokens, used, results[m], results.get(ADAPTIVE)) for m in options.methods]
                print_row(rows[-len(options.methods) :])
    return rows


def row(
    tokens: int, used: Constants, result: MethodResults, adaptive: MethodResults | None
) -> dict[str, Any]:
    """The figures of one method under one budget, compared with the adaptive one on the same problems."""
    if not result.attempts:
        return {"tokens": tokens, "method": result.method, "accuracy": None, "reason": result.reason}
    figures: dict[str, Any] = {
        "tokens": tokens,
        "method": result.method,
        "accuracy": round(result.accuracy, 4),
        "ci95": [round(x, 4) for x in result.ci95],
        "mean_tokens": round(result.mean(lambda a: a.tokens), 1),
        "max_tokens": max(a.tokens for a in result.attempts),
        "calls": round(result.mean(lambda a: a.calls), 1),
        "problems": len(result.attempts),
        "wall_s": round(result.wall_s, 1),
        "constants": used,
    }
    if adaptive and adaptive is not result:
        compared = compare_methods(result, adaptive)
        figures |= {"adaptive_minus_this": round(compared.difference, 4), "p": compared.p}
    return figures


def print_row(rows: Sequence[dict[str, Any]]) -> None:
    """Show rows that are done, on stderr."""
    for one in rows:
        Console(stderr=True).print(one, soft_wrap=True)


def missed_bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each bar that was missed: the adaptive method solves as many as others, and at 1,024 80%."""
    missed = []
    adaptive = {row["tokens"]: row for row in rows if row["method"] == ADAPTIVE}
    for one in rows:
        own = adaptive.get(one["tokens"])
        if own and one["accuracy"] is not None and own["ci95"][1] < one["accuracy"]:
            missed.append(
                f"at {one['tokens']} tokens {one['method']} solves {one['accuracy']:.1%}, apr {own['accuracy']:.1%}"
            )
        if own is one and one["tokens"] == BAR_TOKENS and one["accuracy"] < BAR_ACCURACY:
            missed.append(
                f"at {BAR_TOKENS} tokens apr solves {one['accuracy']:.1%}, expected {BAR_ACCURACY:.0%}"
            )
        if one["accuracy"] is not None and one["max_tokens"] > one["tokens"]:
            missed.append(f"{one['method']} used {one['max_tokens']} of {one['tokens']} tokens")
    return missed


def show(result: dict[str, Any]) -> None:
    """Print the rows as a table."""
    table = Table("tokens", "method", "solved", "95%", "mean tokens", "calls")
    for one in result["rows"]:
        if one["accuracy"] is None:
            table.add_row(str(one["tokens"]), one["method"], "-", one["reason"])
            continue
        low, high = one["ci95"]
        cells = [one["tokens"], one["method"], f"{one['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"]
        table.add_row(*map(str, cells), f"{one['mean_tokens']:.0f}", f"{one['calls']:.1f}")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_args(argv)
    problems = countdown(options.limit, options.split, options.seed)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()

    async def run(url: str) -> list[dict[str, Any]]:
        async with await apr.HttpEngine.connect(url, timeout=TIMEOUT_S) as engine:
            if options.equal_shares:
                engine.resumes_grammar = False
            with Progress(*columns, console=Console(stderr=True)) as progress:
                return await measure(engine, problems, options, progress)

    with Server(locate_model(options.model), **problems.flags) as server:
        rows = asyncio.run(run(server.url))
    result = {
        "hardware": hardware(),
        "versions": versions("sgl-apr", "sglang"),
        "split": options.split,
        "rows": rows,
    }
    return finish(result, missed_bars(rows), show, options)


if __name__ == "__main__":
    sys.exit(main())
