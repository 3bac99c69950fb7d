"""Times joins in the KV cache against text joins on SmolLM2, and what the patched server costs those who do not join.

python -m benchmarks.kv_join.latency [--json] [--check] [--reps 3] [--pairs 20] [--parts joins stock attention]
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
)  # before anything that loads torch: it sets the threads' spinning
from sgl_apr.training.models import random_llama, smollm2
from sgl_apr.trajectory.join_layout import join_branches

BRANCHES, TOKENS = (2, 4, 8), (64, 256, 512, 1024)
PREFIX, HEADER = 64, 12
PARTS = ("joins", "stock", "attention")
STOCK = {"SGLANG_APR_KV_JOIN": "0"}  # the plugin leaves SGLang's cache and positions alone


@dataclass(frozen=True, slots=True)
class Row:
    """One size; medians over the repeats of seconds from the last branch's end to the first token behind the join.

    Reprefilled are the tokens that the joined prompt had computed before its first token, of the header and
    of all that was not found in the cache. A KV join commits every branch first: `kv_s` has that in it.
    """

    branches: int
    tokens: int
    text_reprefilled: int
    kv_reprefilled: int
    text_s: float
    kv_s: float
    speedup: float


async def first_token(engine: apr.HttpEngine, request: apr.Request) -> tuple[float, apr.Result]:
    began = time.perf_counter()
    result = await engine.decode(request)
    return time.perf_counter() - began, result


async def once(
    engine: apr.HttpEngine, rng: random.Random, branches: int, tokens: int
) -> tuple[float, int, float, int]:
    """(seconds, reprefilled) of the KV join and of the text join of the same branches, written just now."""

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1000, 40000) for _ in range(count))

    def request(prompt: tuple[int, ...], new: int = 1, **more: Any) -> apr.Request:
        return apr.Request(f"bench-{rng.getrandbits(48):012x}", prompt, new, {"temperature": 0}, **more)

    prefix, header = ids(PREFIX), ids(HEADER)
    await engine.commit(request(prefix, 0))

    async def branch() -> tuple[int, ...]:
        """As a branch is when it has ended: in the cache but for its last token, which was only just decoded."""
        text = ids(tokens - 1)
        return text + (await engine.decode(request(prefix + text))).token_ids[:1]

    written = [await branch() for _ in range(branches)]
    flat = prefix + tuple(t for b in written for t in b)
    joined = join_branches((), len(prefix), [((), len(prefix) + len(b)) for b in written])

    began = time.perf_counter()
    await asyncio.gather(*(engine.commit(request(prefix + b, 0)) for b in written))
    _, by_kv = await first_token(engine, request(flat + header, layout=(*(joined or ()), len(header))))
    kv_s = time.perf_counter() - began  # a fall-back would have raised 409
    text_s, by_text = await first_token(engine, request(flat + header))
    cached = [by_kv.cached_tokens, by_text.cached_tokens]
    assert None not in cached
    kv, text = (len(flat) + len(header) - (c or 0) for c in cached)
    return kv_s, kv, text_s, text


def joins(reps: int) -> list[Row]:
    """SmolLM2 on one server: both kinds of join, same branches, same attention."""
    os.environ["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    with apr.Server(
        smollm2(), radix_cache_backend="apr", max_total_tokens=32768, context_length=10240
    ) as server:
        return asyncio.run(joined(server.url, reps))


async def joined(url: str, reps: int) -> list[Row]:
    """Both kinds of join on a server that has the context for them."""
    rng, rows = random.Random(0), []
    async with await apr.HttpEngine.connect(url, timeout=600) as engine:
        await once(engine, rng, 2, 16)  # warm
        sizes = [(b, t) for b in BRANCHES for t in TOKENS]
        for branches, tokens in track(sizes, "joins", console=Console(stderr=True)):
            found = [await once(engine, rng, branches, tokens) for _ in range(reps)]
            kv_s, text_s = (statistics.median(f[k] for f in found) for k in (0, 2))
            speedup = statistics.median(f[2] / f[0] for f in found)
            kv, text = (int(statistics.median(f[k] for f in found)) for k in (1, 3))
            rows.append(Row(branches, tokens, text, kv, text_s, kv_s, speedup))
    return rows


async def work(url: str, seed: int) -> float:
    """Seconds for ordinary requests: 16 at once behind a shared prefix, 32 tokens each, twice."""
    rng = random.Random(seed)
    prefix = tuple(rng.randrange(300, 400) for _ in range(200))
    async with await apr.HttpEngine.connect(url) as engine:
        began = time.perf_counter()
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
        return time.perf_counter() - began


def interval(ratios: Sequence[float], rng: random.Random) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


def patched_over_stock(pairs: int) -> dict[str, Any]:
    """Seconds on the joining server, no join in flight, over those without its cache and hook; both resident."""
    rng, ratios = random.Random(1), list[float]()
    options: dict[str, Any] = {"max_total_tokens": 16384, "context_length": 2048}
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        model = random_llama(Path(directory))
        patched = stack.enter_context(apr.Server(model, radix_cache_backend="apr", **options))
        os.environ |= STOCK
        stock = stack.enter_context(apr.Server(model, **options))
        for url in (patched.url, stock.url):
            asyncio.run(work(url, 9999))
        for pair in track(range(pairs), "patched and stock", console=Console(stderr=True)):
            seconds = {}
            for server in rng.sample([patched, stock], 2):
                seconds[server.url] = asyncio.run(work(server.url, pair))
            ratios.append(seconds[patched.url] / seconds[stock.url])
    low, high = interval(ratios, rng)
    return {"patched_over_stock": statistics.median(ratios), "interval": [low, high], "pairs": pairs}


def missed(found: dict[str, Any]) -> list[str]:
    """What is not as it has to be."""
    wrong = [
        f"{r['branches']} x {r['tokens']}: {r['kv_reprefilled']} tokens computed, expected the header's {HEADER}"
        for r in found.get("rows", ())
        if r["kv_reprefilled"] != HEADER
    ]
    for row in found.get("rows", ()):
        if (row["branches"], row["tokens"]) == (4, 512) and row["speedup"] < 5:
            wrong.append(f"4 x 512: {row['speedup']:.1f} times as fast, expected 5")
    if "interval" in found and not (
        found["interval"][0] <= 1 <= found["interval"][1] or found["interval"][1] < 1.03
    ):
        wrong.append(f"patched over stock: {found['interval']}, expected 1 in it, or all below 1.03")
    if found.get("fork_attention_speedup", 2) < 2:
        wrong.append(f"attention of a fork: {found['fork_attention_speedup']:.2f} times as fast, expected 2")
    return wrong


def surroundings() -> dict[str, Any]:
    return {"hardware": hardware(), "versions": versions("sgl-apr", "sglang", "torch")}


def show(found: dict[str, Any]) -> None:
    console = Console(width=120)
    if rows := found.get("rows"):
        table = Table(
            *rows[0], title="From the last branch's end to the first token behind the join (SmolLM2)"
        )
        for row in rows:
            table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    for name in ("patched_over_stock", "interval", "fork_attention_speedup"):
        if name in found:
            console.print(f"{name}: {found[name]}")


def main() -> int:
    """Print tables, or JSON; with --check, status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all of it)")
    add("--reps", type=int, default=3, help="of every join (default: %(default)s)")
    add("--pairs", type=int, default=20, help="of patched and stock (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object on stdout instead of tables")
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if "joins" in options.parts:
        found["rows"] = [asdict(row) for row in joins(options.reps)]
    if "stock" in options.parts:
        found |= patched_over_stock(options.pairs)
    if "attention" in options.parts:
        found["fork_attention_speedup"] = fork_attention_speedup()["speedup"]
    found |= surroundings()
    return finish(found, missed(found), show, options)


if __name__ == "__main__":
    sys.exit(main())
