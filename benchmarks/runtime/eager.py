"""What it saves to start a branch as soon as its outline is written, while the fork still lists others (`eager_branches`).

python -m benchmarks.runtime.eager [--json] [--check] [--problems 20] [--rounds 2] [--url http://127.0.0.1:30000]

The model builtin:spawn answers held-out Countdown problems of four numbers greedily, one after the other, with and without `eager_branches`. Both ways
take turns, each is first in every other round, and both start with empty caches. Only problems where the model forks
count. A figure is the median over problems, and each problem is the median of its rounds; intervals are 95% bootstrap
intervals over problems. The critical path of the eager way counts the fork up to the outline of a branch.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import track
from rich.table import Table

import sgl_apr as apr
from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware, versions
from sgl_apr.evaluation.benchmarks.games import countdown
from sgl_apr.server.launch.launcher import Server
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.training.models import locate_model

POOL_TOKENS = 131_072
BUDGET = apr.Budget(tokens=4096)
OUTLINE_END = "</Message>\n"
WAYS = {"the fork": False, "their outline": True}  # `eager_branches`
NUMBERS = 4  # of a problem: the model forks in most of them, and hardly ever where there are fewer
RESAMPLES = 2000
Attempts = dict[str, list[dict[str, Any]]]  # by way
Interval = tuple[float, float, float]  # the median, and the ends of its interval


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON")
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    add("--problems", type=int, default=20, help="default: %(default)s")
    add("--rounds", type=int, default=2, help="default: %(default)s")
    add("--url", help="a running server of builtin:spawn, on this machine (default: one is started)")
    return parser.parse_args(argv)


@contextmanager
def served(url: str | None) -> Iterator[str]:
    """The address of the server to measure."""
    if url:
        yield url
        return
    with Server(locate_model("builtin:spawn"), max_total_tokens=POOL_TOKENS) as server:
        yield server.url


def flush(url: str) -> None:
    """Empty the server's caches."""
    with urlopen(Request(f"{url}/flush_cache?timeout=30", method="POST"), timeout=60):
        pass


def hidden_tokens(trajectory: apr.Trajectory, tokenizer: Tokenizer) -> int:
    """By how many tokens the critical path is shorter if each branch starts after its outline.

    A block without it takes the fork and then its longest branch: f + max(b). With it, a branch starts after the o tokens
    up to the end of its outline: max(f, max(o + b)).
    """
    forks = [span for span in trajectory.spans if span.role == "fork" and not span.path]
    saved = 0
    for fork, block in zip(forks, trajectory.blocks, strict=True):
        ids = fork.token_ids or ()
        starts = outline_ends(ids, tokenizer)
        spans = [[trajectory.spans[i] for i in branch.spans] for branch in block.branches]
        lengths = [sum(span.tokens for span in one if span.role != "result") for one in spans]
        if len(starts) != len(lengths):  # branches that a limit has left out
            continue
        size = len(ids)
        eager = max(size, *(start + length for start, length in zip(starts, lengths, strict=True)))
        saved += size + max(lengths) - eager
    return saved


def outline_ends(fork: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """How many tokens of a fork are written when each of its outlines is complete."""
    closed = [tokenizer.decode(fork[:count]).count(OUTLINE_END) for count in range(len(fork) + 1)]
    return [count for count in range(1, len(fork) + 1) if closed[count] > closed[count - 1]]


async def attempt(engine: apr.HttpEngine, prompt: str, *, eager: bool) -> dict[str, Any]:
    """Answer one problem."""
    started = time.monotonic()
    t = await apr.areason(engine, prompt, temperature=0.0, budget=BUDGET, eager_branches=eager)
    seconds, metrics = time.monotonic() - started, t.metrics()
    hidden = hidden_tokens(t, engine.tokenizer) if eager else 0
    return {
        "latency_s": seconds,
        "critical_path": metrics.critical_path - hidden,
        "tokens": metrics.total,
        "calls": metrics.engine_calls,
        "branches": metrics.branches,
        "text": t.text,
    }


async def measure(url: str, problems: int, rounds: int) -> list[Attempts]:
    """The attempts at each problem where the model forks, by way."""
    cases = [case for case in countdown(4 * problems).cases if case.size == NUMBERS][:problems]
    measured = []
    async with await apr.HttpEngine.connect(url) as engine:
        for eager in WAYS.values():  # the server has compiled no grammar yet
            await attempt(engine, cases[0].name, eager=eager)
        for case in track(cases, "problems", console=Console(stderr=True)):
            attempts: Attempts = {way: [] for way in WAYS}
            for number in range(rounds):
                for way in WAYS if number % 2 else reversed(WAYS):
                    await asyncio.to_thread(flush, url)
                    attempts[way].append(await attempt(engine, case.name, eager=WAYS[way]))
            if attempts["the fork"][0]["branches"]:
                measured.append(attempts)
    return measured


def with_interval(values: Sequence[float]) -> Interval:
    """The median of some values, and its 95% bootstrap interval."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    low, high = medians[RESAMPLES // 40], medians[-RESAMPLES // 40 - 1]
    return round(median(values), 4), round(low, 4), round(high, 4)


def report(measured: Sequence[Attempts]) -> dict[str, Any]:
    """All figures."""

    def of_problems(way: str, key: str) -> list[float]:
        return [median(attempt[key] for attempt in attempts[way]) for attempts in measured]

    def ratio(key: str) -> Interval:
        plain, eager = (of_problems(way, key) for way in WAYS)
        return with_interval([e / p for p, e in zip(plain, eager, strict=True)])

    keys = ("latency_s", "critical_path", "tokens", "calls")

    def is_same(attempts: Attempts) -> bool:
        return len({attempt["text"] for way in WAYS for attempt in attempts[way]}) == 1

    return {
        "problems": len(measured),
        "rounds": len(measured[0]["the fork"]),
        "branches": round(median(of_problems("the fork", "branches")), 1),
        "rows": [{"way": way} | {key: with_interval(of_problems(way, key)) for key in keys} for way in WAYS],
        "ratio": {key: ratio(key) for key in keys},
        "same_text": sum(map(is_same, measured)),
    }


def missed_bars(result: dict[str, Any]) -> list[str]:
    """A sentence for each bar that was missed: it shortens the critical path, and takes no more tokens.

    Whether that saves time depends on the engine: branches that start one by one are also prefilled one by one.
    """
    missed, high = [], result["ratio"]["critical_path"][2]
    if high >= 1:
        missed.append(f"critical path ratio up to {high:.3f}, expected below 1")
    if result["ratio"]["tokens"][0] != 1:
        missed.append(f"{result['ratio']['tokens'][0]:.3f} times as many tokens, expected 1")
    return missed


def show(result: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table("", "latency, s", "critical path", "tokens", "requests")
    for row in [*result["rows"], {"way": "ratio", **result["ratio"]}]:
        cells = (row[key] for key in ("latency_s", "critical_path", "tokens", "calls"))
        table.add_row(row["way"], *(f"{middle:.4g} ({low:.4g} to {high:.4g})" for middle, low, high in cells))
    console = Console()
    console.print(table)
    console.print(
        f"{result['problems']} problems with forks, {result['branches']} branches (median), {result['rounds']} rounds; "
        f"{result['same_text']} with the same text every time"
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_args(argv)
    with served(options.url) as url:
        measured = asyncio.run(measure(url, options.problems, options.rounds))
    if not measured:
        raise SystemExit("the model has not forked in any problem")
    result = {
        "hardware": hardware(),
        "versions": versions("sgl-apr", "sglang"),
        "budget": BUDGET.tokens,
        **report(measured),
    }
    return finish(result, missed_bars(result), show, options)


if __name__ == "__main__":
    sys.exit(main())
