"""Questions about long texts with and without recursion: one prompt that holds all of the text, or sub-calls that read its parts.

python -m benchmarks.quality.long_context [--model smollm2:ledger] [--sizes 1k,4k,16k,64k] [--limit 24,12,6,3] [-o runs/long-context] [--json]

The texts are ledgers (`sgl-apr eval ledger:SIZE`): questions that need one line, and questions that need all of them. A prompt that is longer
than the context of the model cannot be asked at all. The default is SmolLM2 with an adapter that is trained to read ledgers, as docs/methods.md says.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
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
from sgl_apr.evaluation.store import ResultStore, open_evaluation
from sgl_apr.evaluation.tasks.ledger import lines_of
from sgl_apr.runtime.budget import Budget
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.demonstrations.ledger_notes import KINDS
from sgl_apr.training.models import locate_model

AT_ONCE = 8  # problems
SEED = 1  # of the ledgers: replies about those of seed 0 were read to improve the demonstrations, so they are not held out
ANSWER_TOKENS = 64  # of a reply, beside its walk
TOKENS_PER_LINE = 8  # of a reply that walks through all lines of one prompt
TIMEOUT_S = 1800.0  # of a prompt of 64,000 tokens on a CPU


async def attempt(
    engine: apr.HttpEngine, problems: Benchmark, method: str, options: dict[str, Any], store: ResultStore
) -> MethodResults:
    """Attempt all problems that the store does not have, some of them at the same time."""
    options = {"budget": problems.budget, "temperature": 0.0, "seed": 0, **options}
    try:
        return await run_attempts(engine, problems, method, store, at_once=AT_ONCE, **options)
    except AprError as error:  # the prompt does not fit the context
        return MethodResults(method, (), reason=str(error))


async def measure(
    url: str,
    model: str,
    sizes: Sequence[tuple[str, int]],
    part_tokens: int,
    reply_tokens: int,
    attempts: Path | None,
) -> list[dict[str, Any]]:
    """One row for each size, with its number of problems, and way."""
    rows = []
    async with await apr.HttpEngine.connect(url, timeout=TIMEOUT_S) as engine:
        for size, limit in sizes:
            problems = ledger(size, limit, seed=SEED, kinds=KINDS)
            walk = ANSWER_TOKENS + TOKENS_PER_LINE * lines_of(size)
            ways: dict[str, dict[str, Any]] = {
                "sequential": {"budget": Budget(tokens=walk)},
                "recursive": {"part_tokens": part_tokens, "reply_tokens": reply_tokens},
            }
            for method, options in ways.items():
                settings = {
                    "task": problems.name, "ledgers": SEED, "model": model, "part_tokens": part_tokens, "reply_tokens": reply_tokens
                }  # fmt: skip
                with open_evaluation(attempts and attempts / size, settings) as store:
                    result = await attempt(engine, problems, method, options, store)
                rows.append({"size": size, "problems": limit} | row(result))
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
        "seconds": result.wall_s / len(result.attempts),
    }


def show(result: dict[str, Any]) -> None:
    """Print a table for people."""
    table = Table(
        "size", "problems", "method", "solved", "by kind", "tokens", "critical path", "context", "s a problem"
    )
    for one in result["rows"]:
        if one["accuracy"] is None:
            table.add_row(one["size"], str(one["problems"]), one["method"], "-", one["reason"][:60])
            continue
        kinds = " ".join(f"{kind} {share:.0%}" for kind, share in one["by_kind"].items())
        table.add_row(
            one["size"], str(one["problems"]), one["method"], f"{one['accuracy']:.0%}", kinds, f"{one['tokens']:,.0f}",
            f"{one['critical_path']:,.0f}", f"{one['longest_context']:,}", f"{one['seconds']:.1f}",
        )  # fmt: skip
    Console().print(table)


def main() -> int:
    """Serve the model, and measure both ways at all sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2:ledger", help="default: %(default)s")
    parser.add_argument("--sizes", default="1k,4k,16k,64k", help="thousands of tokens (default: %(default)s)")
    parser.add_argument("--limit", default="24,12,6,3", help="problems of each size (default: %(default)s)")
    parser.add_argument(
        "--part-tokens", type=int, default=320, help="tokens that a sub-call reads (default: %(default)s)"
    )
    parser.add_argument(
        "--reply-tokens", type=int, default=256, help="tokens of a note (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="keep attempts in this directory, and make only those it does not have",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    sizes, limits = options.sizes.split(","), options.limit.split(",")
    if not all(limit.isdecimal() and int(limit) for limit in limits):
        parser.error(f"--limit {options.limit}, expected numbers of at least 1")
    if len(limits) not in (1, len(sizes)):
        parser.error(f"{len(limits)} limits of {len(sizes)} sizes, expected one for each, or one for all")
    counts = [int(limit) for limit in limits] * (len(sizes) // len(limits))
    problems = list(zip(sizes, counts, strict=True))
    with Server(locate_model(options.model), max_total_tokens=131072) as server:
        rows = asyncio.run(
            measure(
                server.url, options.model, problems, options.part_tokens, options.reply_tokens, options.output
            )
        )
    result = {"hardware": hardware(), "model": options.model, "rows": rows}
    return finish(result | {"part_tokens": options.part_tokens}, [], show, options)


if __name__ == "__main__":
    sys.exit(main())
