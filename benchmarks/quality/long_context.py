"""Questions about long texts with and without recursion: one prompt that holds all of the text, or sub-calls that read its parts.

python -m benchmarks.quality.long_context [--model runs/ledger/run/model] [--sizes 1k,4k,16k,64k] [--limit 40] [--part-tokens 320] [--json]

The texts are ledgers (`sgl-apr eval ledger:SIZE`): questions that need one line, and questions that need all of them. A prompt that is longer
than the context of the model cannot be asked at all. The default is SmolLM2 with an adapter that is trained to read ledgers, as docs/methods.md says.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

import sgl_apr as apr
from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware
from sgl_apr.errors import AprError
from sgl_apr.evaluation.benchmarks.base import Benchmark
from sgl_apr.evaluation.benchmarks.long_context import ledger
from sgl_apr.evaluation.metrics import AttemptMetrics, MethodResults
from sgl_apr.evaluation.runner import run_attempts
from sgl_apr.evaluation.store import ResultStore
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import locate_model

TIMEOUT_S = 1800.0  # of a prompt of 64,000 tokens on a CPU


async def attempt(
    engine: apr.HttpEngine, problems: Benchmark, method: str, options: dict[str, Any]
) -> MethodResults:
    """Attempt all problems, one at a time."""
    options = {"budget": problems.budget, "temperature": 0.0, "seed": 0, **options}
    try:
        return await run_attempts(engine, problems, method, ResultStore(), at_once=1, **options)
    except AprError as error:  # the prompt does not fit the context
        return MethodResults(method, (), reason=str(error))


async def measure(
    url: str, sizes: Sequence[str], limit: int, part_tokens: int, reply_tokens: int
) -> list[dict[str, Any]]:
    """One row for each size and way."""
    ways = {
        "sequential": {},
        "recursive": {"part_tokens": part_tokens, "reply_tokens": reply_tokens},
    }
    rows = []
    async with await apr.HttpEngine.connect(url, timeout=TIMEOUT_S) as engine:
        for size in sizes:
            problems = ledger(size, limit)
            for method, options in ways.items():
                rows.append({"size": size} | row(await attempt(engine, problems, method, options)))
                Console(stderr=True).print(rows[-1], soft_wrap=True)
    return rows


def row(result: MethodResults) -> dict[str, Any]:
    """The figures of one method at one size."""
    if not result.attempts:
        return {"method": result.method, "accuracy": None, "reason": result.reason}
    by_kind: dict[str, list[AttemptMetrics]] = {}
    for one in result.attempts:
        by_kind.setdefault(one.problem.split()[0], []).append(one)
    return {
        "method": result.method,
        "accuracy": result.accuracy,
        "accuracy_ci95": result.ci95,
        "by_kind": {kind: fmean(one.correct for one in some) for kind, some in by_kind.items()},
        "tokens": result.mean(lambda a: a.tokens),
        "critical_path": result.mean(lambda a: a.critical_path),
        "longest_context": max(a.context for a in result.attempts),
        "calls": result.mean(lambda a: a.calls),
        "seconds": result.mean_known(lambda a: a.took_s),
    }


def show(result: dict[str, Any]) -> None:
    """Print a table for people."""
    table = Table("size", "method", "solved", "by kind", "tokens", "critical path", "context", "seconds")
    for one in result["rows"]:
        if one["accuracy"] is None:
            table.add_row(one["size"], one["method"], "-", one["reason"][:60])
            continue
        kinds = " ".join(f"{kind} {share:.0%}" for kind, share in one["by_kind"].items())
        table.add_row(
            one["size"], one["method"], f"{one['accuracy']:.0%}", kinds, f"{one['tokens']:,.0f}",
            f"{one['critical_path']:,.0f}", f"{one['longest_context']:,}", f"{one['seconds']:.1f}",
        )  # fmt: skip
    Console().print(table)


def main() -> int:
    """Serve the model, and measure both ways at all sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="runs/ledger/run/model", help="default: %(default)s")
    parser.add_argument("--sizes", default="1k,4k,16k,64k", help="thousands of tokens (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=40, help="problems of each size (default: %(default)s)")
    parser.add_argument(
        "--part-tokens", type=int, default=320, help="tokens that a sub-call reads (default: %(default)s)"
    )
    parser.add_argument(
        "--reply-tokens", type=int, default=128, help="tokens of a note (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with Server(locate_model(options.model), max_total_tokens=131072) as server:
        rows = asyncio.run(
            measure(
                server.url, options.sizes.split(","), options.limit, options.part_tokens, options.reply_tokens
            )
        )
    result = {"hardware": hardware(), "model": options.model, "problems": options.limit, "rows": rows}
    return finish(result | {"part_tokens": options.part_tokens}, [], show, options)


if __name__ == "__main__":
    sys.exit(main())
