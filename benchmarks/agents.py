"""Several workers over one long context: what they find in the cache, and how long they take at once and one after another.

python benchmarks/agents.py [--json] [--check] [--workers 2,4,8] [--contexts 1000,4000,20000] [--rounds 3]
python benchmarks/agents.py --url http://127.0.0.1:30000      # a server on this machine

A random model of 3 layers serves, so that times are those of an engine and not of a large model. Both ways find the
conversation in the cache and nothing else, decode as many tokens, and alternate. The seconds are medians. `second_turn_cached` is the part of
the first turn of a chat that its second turn finds, with a reply that forked into as many branches.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import track
from rich.table import Table

import sgl_apr as apr
from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware, versions
from benchmarks.common.second_turn import measure_second_turn
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import random_llama

WORKERS, CONTEXTS = (2, 4, 8), (1000, 4000, 20_000)
MODEL_CONTEXT, POOL_TOKENS = 32_768, 98_304
DIALECT = "threadweaver"
WORKER_TOKENS = 32
SECOND_TURN_BAR = 0.95
SENTENCE = "The model thinks about the problem, and each part becomes a branch with a number. "


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a running server (default: one of a random model)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--workers", type=numbers, default=WORKERS, help="default: 2,4,8")
    parser.add_argument(
        "--contexts", type=numbers, default=CONTEXTS, help="tokens (default: 1000,4000,20000)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    return parser.parse_args(argv)


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, separated by commas."""
    return tuple(int(number) for number in text.split(","))


@contextmanager
def served(url: str | None) -> Iterator[str]:
    """The address of the server to measure."""
    if url:
        yield url
        return
    with tempfile.TemporaryDirectory() as directory:
        tags = apr.dialect(DIALECT).tags
        model = random_llama(Path(directory), tags=list(tags), tag_bias=5.0, context=MODEL_CONTEXT)
        flags: dict[str, Any] = {"max_total_tokens": POOL_TOKENS, "context_length": MODEL_CONTEXT}
        with Server(model, **flags) as server:
            yield server.url


def flush(url: str) -> None:
    """Empty the server's caches."""
    with urlopen(Request(f"{url}/flush_cache?timeout=30", method="POST"), timeout=60):
        pass


def document(engine: apr.Engine, tokens: int) -> str:
    """A text of about so many tokens of the engine's model."""
    length = len(engine.tokenizer.encode(SENTENCE))
    return "".join(f"{k}: {SENTENCE}" for k in range(max(1, tokens // (length + 3))))


def make_tasks(count: int) -> list[apr.ForkTask]:
    """Tasks of a few tokens each."""
    return [
        apr.ForkTask(f"Report on part {k} of the document.", max_tokens=WORKER_TOKENS)
        for k in range(1, count + 1)
    ]


async def measure(
    engine: apr.HttpEngine, url: str, workers: int, context: int, rounds: int
) -> dict[str, Any]:
    """Measure one number of workers over one length of context."""
    messages = [{"role": "user", "content": document(engine, context)}]
    tasks, at_once, serial, shares = make_tasks(workers), list[float](), list[float](), list[float]()
    shared, options = 0, dict[str, Any](temperature=1.0, budget={"tokens": 4096})
    for number in range(rounds):
        for is_serial in (False, True) if number % 2 else (True, False):
            flush(url)
            await apr.fork(engine, messages, [apr.ForkTask("Are you ready?", max_tokens=1)])
            started = time.perf_counter()
            if is_serial:
                for task in tasks:
                    await apr.fork(engine, messages, [task], seed=number, **options)
                serial.append(time.perf_counter() - started)
            else:
                result = await apr.fork(engine, messages, tasks, seed=number, **options)
                at_once.append(time.perf_counter() - started)
                shares.append(result.min_cached_share)
                shared = result.shared_tokens
    wall_s, serial_s = statistics.median(at_once), statistics.median(serial)
    return {
        "workers": workers,
        "context": shared,
        "min_cached_share": min(shares),
        "wall_s": round(wall_s, 3),
        "serial_wall_s": round(serial_s, 3),
        "gain": round(serial_s / wall_s, 2),
        "second_turn_cached": round(await second_turn(url, messages[0]["content"], workers), 4),
    }


async def second_turn(url: str, question: str, workers: int) -> float:
    """The part of the first turn of a chat that the second finds, with a reply of so many branches."""
    budget = {"tokens": 60 * workers + 200, "width": workers, "branch_tokens": WORKER_TOKENS}
    options = {
        "dialect": DIALECT,
        "mode": "parallel",
        "max_blocks": 1,
        "min_width": workers,
        "budget": budget,
    }
    request = {"temperature": 1.0}
    return (await measure_second_turn(url, options, request=request, question=question)).share


def missed_bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each bar that was missed."""
    missed = []
    for row in rows:
        name = f"{row['workers']} workers over {row['context']} tokens"
        if row["min_cached_share"] < 1:
            missed.append(
                f"{name}: a worker found {row['min_cached_share']:.1%} of what all share in the cache"
            )
        if row["wall_s"] >= row["serial_wall_s"]:
            missed.append(f"{name}: {row['wall_s']} s at once, {row['serial_wall_s']} s one after another")
        if row["second_turn_cached"] < SECOND_TURN_BAR:
            missed.append(f"{name}: the second turn found {row['second_turn_cached']:.1%} in the cache")
    return missed


def show(result: dict[str, Any]) -> None:
    """Print the rows as a table."""
    table = Table("workers", "context", "cached", "at once", "one after another", "gain", "second turn")
    for row in result["rows"]:
        table.add_row(
            str(row["workers"]), str(row["context"]), f"{row['min_cached_share']:.1%}", f"{row['wall_s']:.2f} s",
            f"{row['serial_wall_s']:.2f} s", f"{row['gain']:.2f}", f"{row['second_turn_cached']:.1%}",
        )  # fmt: skip
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_args(argv)
    cases = [(workers, context) for context in options.contexts for workers in options.workers]

    async def run(url: str) -> list[dict[str, Any]]:
        async with await apr.HttpEngine.connect(url, timeout=600) as engine:
            await apr.fork(engine, "Warm up. ", make_tasks(2))
            shown = track(cases, "agents", console=Console(stderr=True))
            return [await measure(engine, url, *case, options.rounds) for case in shown]

    with served(options.url) as url:
        rows = asyncio.run(run(url))
    result = {"hardware": hardware(), "versions": versions("sgl-apr", "sglang"), "rows": rows}
    return finish(result, missed_bars(rows), show, options)


if __name__ == "__main__":
    sys.exit(main())
