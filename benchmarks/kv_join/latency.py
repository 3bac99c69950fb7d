"""Latency of joins in the KV cache and of text joins on SmolLM2, and the cost of the patched server without joins.

python -m benchmarks.kv_join.latency [--json] [--check] [--reps 3] [--starts 5] [--pairs 8] [--page-size 1]
    [--parts joins stock attention]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import sgl_apr as apr
from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware, versions
from benchmarks.kernels.attention import (
    fork_attention_speedup,
)  # first: it sets how threads wait, before torch is loaded
from sgl_apr.training.models import random_llama, smollm2
from sgl_apr.trajectory.join_layout import join_branches

BRANCHES, TOKENS = (2, 4, 8), (64, 256, 512, 1024)
PREFIX, HEADER = 64, 12
PARTS = ("joins", "stock", "attention")
STOCK = {"SGLANG_APR_KV_JOIN": "0"}  # the plugin then leaves SGLang's cache and positions unchanged


@dataclass(frozen=True, slots=True)
class Row:
    """The results for one size: medians over all repetitions.

    Attributes:
        branches: Number of branches.
        tokens: Tokens per branch.
        text_reprefilled: Tokens of the prompt that a text join computes before its first token: those of the header,
            and those that were not found in the cache.
        kv_reprefilled: The same for a KV join.
        text_s: Seconds from the end of the last branch to the first token after a text join.
        kv_s: The same for a KV join, including the commits of all branches.
        speedup: `text_s / kv_s`.
    """

    branches: int
    tokens: int
    text_reprefilled: int
    kv_reprefilled: int
    text_s: float
    kv_s: float
    speedup: float


async def first_token(engine: apr.HttpEngine, request: apr.Request) -> tuple[float, apr.Result]:
    """Seconds that a request takes, and its result."""
    started = time.perf_counter()
    result = await engine.decode(request)
    return time.perf_counter() - started, result


async def once(
    engine: apr.HttpEngine, rng: random.Random, branches: int, tokens: int
) -> tuple[float, int, float, int]:
    """Seconds and prefilled tokens of the KV join, then of the text join, of the same new branches."""

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1000, 40000) for _ in range(count))

    def request(prompt: tuple[int, ...], new: int = 1, **more: Any) -> apr.Request:
        return apr.Request(f"bench-{rng.getrandbits(48):012x}", prompt, new, {"temperature": 0}, **more)

    prefix, header = ids(PREFIX), ids(HEADER)
    await engine.commit(request(prefix, 0))

    async def branch() -> tuple[int, ...]:
        """A branch that has just ended: all of it is in the cache except the last token."""
        text = ids(tokens - 1)
        return text + (await engine.decode(request(prefix + text))).token_ids[:1]

    ended = [await branch() for _ in range(branches)]
    flat = prefix + tuple(t for b in ended for t in b)
    joined = join_branches((), len(prefix), [((), len(prefix) + len(b)) for b in ended])

    started = time.perf_counter()
    await asyncio.gather(*(engine.commit(request(prefix + b, 0)) for b in ended))
    _, by_kv = await first_token(engine, request(flat + header, layout=(*(joined or ()), len(header))))
    kv_s = time.perf_counter() - started  # a join that falls back to text would have raised 409
    text_s, by_text = await first_token(engine, request(flat + header))
    cached = [by_kv.cached_tokens, by_text.cached_tokens]
    assert None not in cached
    kv, text = (len(flat) + len(header) - (c or 0) for c in cached)
    return kv_s, kv, text_s, text


def joins(reps: int, page_size: int) -> list[Row]:
    """Measure both kinds of join on a server with SmolLM2."""
    os.environ["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    with apr.Server(
        smollm2(),
        radix_cache_backend="apr",
        max_total_tokens=32768,
        context_length=10240,
        page_size=page_size,
    ) as server:
        return asyncio.run(measure_joins(server.url, reps))


async def measure_joins(url: str, reps: int) -> list[Row]:
    """Measure both kinds of join on a server with a context of at least 10,240 tokens."""
    rng, rows = random.Random(0), []
    async with await apr.HttpEngine.connect(url, timeout=600) as engine:
        await once(engine, rng, 2, 16)  # warm
        sizes = [(b, t) for b in BRANCHES for t in TOKENS]
        for branches, tokens in track(sizes, "joins", console=Console(stderr=True)):
            samples = [await once(engine, rng, branches, tokens) for _ in range(reps)]
            kv_s, text_s = (statistics.median(s[k] for s in samples) for k in (0, 2))
            speedup = statistics.median(s[2] / s[0] for s in samples)
            kv, text = (int(statistics.median(s[k] for s in samples)) for k in (1, 3))
            rows.append(Row(branches, tokens, text, kv, text_s, kv_s, speedup))
    return rows


async def work(url: str, seed: int) -> float:
    """Seconds for ordinary requests: twice 16 in parallel after a shared prefix, 32 tokens each."""
    rng = random.Random(seed)
    prefix = tuple(rng.randrange(300, 400) for _ in range(200))
    async with await apr.HttpEngine.connect(url) as engine:
        started = time.perf_counter()
        for turn in range(2):
            await asyncio.gather(
                *(
                    engine.decode(
                        apr.Request(
                            f"stock-{seed:04}-{turn}-{k:02}", (*prefix, 300 + k, turn + 300), 32,
                            {"temperature": 0, "ignore_eos": True},
                        )
                    )
                    for k in range(16)
                )
            )  # fmt: skip
        return time.perf_counter() - started


def interval(starts: Sequence[Sequence[float]], rng: random.Random) -> tuple[float, float]:
    """The 95% bootstrap interval of the median over starts of the medians of their ratios.

    Starts are drawn first, then the ratios of each: pairs of one start are more alike than pairs of several.
    """

    def draw() -> float:
        return statistics.median(
            statistics.median(rng.choices(ratios, k=len(ratios)))
            for ratios in rng.choices(starts, k=len(starts))
        )

    medians = sorted(draw() for _ in range(2000))
    return medians[50], medians[1949]


def patched_over_stock(starts: int, pairs: int, page_size: int) -> dict[str, Any]:
    """The time of ordinary requests on a server that joins and runs groups, relative to one without these parts."""
    rng, ratios = random.Random(1), list[list[float]]()
    with tempfile.TemporaryDirectory() as directory:
        model = random_llama(Path(directory))
        for start in track(range(starts), "patched and stock", console=Console(stderr=True)):
            ratios.append(paired_ratios(model, pairs, page_size, rng, seed=start * pairs))
    low, high = interval(ratios, rng)
    medians = [statistics.median(start) for start in ratios]
    return {
        "patched_over_stock": statistics.median(medians), "interval": [low, high], "pairs": pairs,
        "starts": [round(median, 4) for median in medians],
    }  # fmt: skip


def paired_ratios(model: Path, pairs: int, page_size: int, rng: random.Random, seed: int) -> list[float]:
    """Start both servers, in random order, and return the ratio of their times for each of some pairs of runs."""
    options: dict[str, Any] = {"max_total_tokens": 16384, "context_length": 2048, "page_size": page_size}
    servers = {}
    with ExitStack() as stack:
        for name in rng.sample(["patched", "stock"], 2):
            backend: dict[str, Any] = {"radix_cache_backend": "apr"} if name == "patched" else {}
            environment = dict(os.environ)
            os.environ |= {} if name == "patched" else STOCK
            try:
                servers[name] = stack.enter_context(apr.Server(model, **backend, **options))
            finally:
                os.environ.clear()
                os.environ |= environment
        for server in servers.values():
            asyncio.run(work(server.url, 9999))
        ratios = []
        for pair in range(seed, seed + pairs):
            seconds = {}
            for name in rng.sample(["patched", "stock"], 2):
                seconds[name] = asyncio.run(work(servers[name].url, pair))
            ratios.append(seconds["patched"] / seconds["stock"])
    return ratios


def missed(results: dict[str, Any]) -> list[str]:
    """The bars that are missed, one sentence each."""
    problems = [
        f"{r['branches']} x {r['tokens']}: {r['kv_reprefilled']} tokens computed, expected the header's {HEADER}"
        for r in results.get("rows", ())
        if r["kv_reprefilled"] != HEADER
    ]
    for row in results.get("rows", ()):
        if (row["branches"], row["tokens"]) == (4, 512) and row["speedup"] < 5:
            problems.append(f"4 x 512: {row['speedup']:.1f} times as fast, expected 5")
    if "interval" in results and not (
        results["interval"][0] <= 1 <= results["interval"][1] or results["interval"][1] < 1.03
    ):
        problems.append(f"patched over stock: {results['interval']}, expected 1 in it, or all below 1.03")
    if results.get("fork_attention_speedup", 2) < 2:
        problems.append(
            f"attention of a fork: {results['fork_attention_speedup']:.2f} times as fast, expected 2"
        )
    return problems


def environment() -> dict[str, Any]:
    return {"hardware": hardware(), "versions": versions("sgl-apr", "sglang", "torch")}


def show(results: dict[str, Any]) -> None:
    console = Console(width=120)
    if rows := results.get("rows"):
        table = Table(
            *rows[0], title="From the end of the last branch to the first token after the join (SmolLM2)"
        )
        for row in rows:
            table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    for name in ("patched_over_stock", "interval", "fork_attention_speedup"):
        if name in results:
            console.print(f"{name}: {results[name]}")


def main() -> int:
    """Print tables, or JSON; with --check, status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: everything)")
    add("--reps", type=int, default=3, help="repetitions of every join (default: %(default)s)")
    add("--starts", type=int, default=5, help="starts of a patched and a stock server (default: %(default)s)")
    add("--pairs", type=int, default=8, help="pairs of patched and stock runs in each (default: %(default)s)")
    add("--page-size", type=int, default=1, help="tokens of a page of the KV cache (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object on stdout instead of tables")
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    results: dict[str, Any] = {"page_size": options.page_size}
    if "joins" in options.parts:
        results["rows"] = [asdict(row) for row in joins(options.reps, options.page_size)]
    if "stock" in options.parts:
        results |= patched_over_stock(options.starts, options.pairs, options.page_size)
    if "attention" in options.parts:
        results["fork_attention_speedup"] = fork_attention_speedup()["speedup"]
    results |= environment()
    return finish(results, missed(results), show, options)


if __name__ == "__main__":
    sys.exit(main())
