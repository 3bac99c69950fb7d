"""Time of the fork-join loop in addition to the engine's, and throughput of many trajectories in one process."""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import track
from rich.table import Table

import sgl_apr as apr
from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware, versions
from benchmarks.common.processes import peak_rss_mb
from benchmarks.runtime.loop_time import DIALECT, FORCED, FORK, REPETITIONS, ReplayEngine, loop_times, script
from benchmarks.runtime.throughput import throughput
from sgl_apr.engine.base import TokenSink
from sgl_apr.engine.sglang_request import INTERVAL_PARAM, STREAM_INTERVAL
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.training.models import random_llama

BARS = {"loop_cpu_us": 150, "wall_ratio_vs_bare": 1.05, "wall_ratio_vs_serial": 1.0}  # upper limits
WIDTHS = (4, 5, 6, 8)  # branches of the trajectories that run in parallel for the wall times
FREE = FORK | {"budget": apr.Budget(tokens=160, width=4, outline_chars=8)}
EXAMPLES = """examples:
  python -m benchmarks.runtime.overhead --json --check
  python -m benchmarks.runtime.overhead --parts overhead
  python -m benchmarks.runtime.overhead --parts walls throughput --pairs 2 --levels 1 16    # a short trial"""


@dataclass(frozen=True)
class Tree:
    """A known trajectory: its prompt, and body and answer of the requests of trunk, branches and conclusion.

    A commit, if the loop sends one, stands before the branches.
    """

    prompt: tuple[int, ...]
    trunk: list[tuple[dict[str, Any], tuple[int, ...]]]
    branches: list[tuple[dict[str, Any], tuple[int, ...]]]

    @property
    def requests(self) -> list[tuple[dict[str, Any], tuple[int, ...]]]:
        return [*self.trunk, *self.branches]


async def record_tree(tokenizer: Tokenizer, width: int) -> Tree:
    """The requests of the loop for one fork into `width` branches, with grammars that force the answers."""
    engine = ReplayEngine(tokenizer, script(tokenizer, width, 48))
    engine.caches_output = True  # as a server does
    prompt = tuple(tokenizer.encode(f"Question {width}: ", add_special_tokens=True))
    assert DIALECT.is_valid((await apr.areason(engine, prompt, DIALECT, **FORCED)).text)

    def forced(request: apr.Request) -> tuple[dict[str, Any], tuple[int, ...]]:
        answer = engine.answers[request.input_ids]
        sampling = {
            "skip_special_tokens": False,
            **request.sampling,
            "max_new_tokens": request.max_tokens,
            "stop_token_ids": list(request.stop_ids),
            "ebnf": f"start: {' '.join(f'<[{i}]>' for i in answer if i not in tokenizer.eos_ids)}\n",
            INTERVAL_PARAM: STREAM_INTERVAL,
        }
        return {"input_ids": list(request.input_ids), "sampling_params": sampling}, answer

    commit = {"input_ids": list(engine.prefix), "sampling_params": {"max_new_tokens": 0}}
    commits = [(commit, ())] if engine.prefix else []
    trunk, *others = map(forced, engine.requests)
    return Tree(prompt, [trunk, *commits], others)


class ForcedEngine(apr.HttpEngine):
    """Replaces the loop's grammar by one that forces the known answer."""

    known: dict[tuple[int, ...], tuple[str, tuple[int, ...]]]

    async def decode(self, request: apr.Request, on_tokens: TokenSink | None = None) -> apr.Result:
        grammar, answer = self.known[request.input_ids]
        result = await super().decode(replace(request, grammar=grammar), on_tokens)
        assert result.token_ids == answer
        return result


async def loop(engine: ForcedEngine, trees: Sequence[Tree]) -> None:
    """Run the trees through the loop, which does not know them."""
    await asyncio.gather(*(apr.areason(engine, t.prompt, DIALECT, **FORCED) for t in trees))


async def bare(url: str, trees: Sequence[Tree], parallel: bool) -> None:
    """Run the trees by a bare HTTP client that knows them, with branches in parallel or one after another."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def answer(body: dict[str, Any], expected: tuple[int, ...]) -> None:
            async with session.post(f"{url}/generate", json=body | {"stream": True}) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        data = json.loads(line[6:])
            assert tuple(data["output_ids"]) == expected

        async def run(tree: Tree) -> None:
            *branches, conclusion = tree.branches
            for request in tree.trunk:
                await answer(*request)
            if parallel:
                await asyncio.gather(*(answer(*branch) for branch in branches))
            else:
                for branch in branches:
                    await answer(*branch)
            await answer(*conclusion)

        await asyncio.gather(*map(run, trees))


async def timed(arm: str, engine: ForcedEngine, trees: Sequence[Tree]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of this process for one kind of run; it empties the caches of the server first."""
    flush = f"{engine.url}/flush_cache?timeout=30"
    async with aiohttp.ClientSession(raise_for_status=True) as session, session.post(flush):
        pass
    started, cpu = time.perf_counter(), time.process_time()
    await (loop(engine, trees) if arm == "loop" else bare(engine.url, trees, parallel=arm == "bare"))
    return time.perf_counter() - started, time.process_time() - cpu


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A bootstrap 95% confidence interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(4000))
    return round(medians[100], 3), round(medians[-101], 3)


async def walls(url: str, pairs: int, console: Console) -> dict[str, Any]:
    """Wall times of the loop relative to the bare client, alternately, and in every 4th pair to sequential branches."""
    async with await ForcedEngine.connect(url) as engine:
        assert isinstance(engine, ForcedEngine)
        trees = [await record_tree(engine.tokenizer, width) for width in WIDTHS]
        engine.known = {
            tuple(body["input_ids"]): (body["sampling_params"].get("ebnf"), answer)
            for tree in trees
            for body, answer in tree.requests
        }
        results: list[dict[str, tuple[float, float]]] = []
        for i in track(range(-1, pairs), "pairs", console=console):  # the first warms up
            arms = ["loop", "bare", *["serial"] * (i % 4 == 0)]
            results.append({arm: await timed(arm, engine, trees) for arm in arms[:: 1 if i % 2 else -1]})
    taken = {arm: [f[arm] for f in results[1:] if arm in f] for arm in ("loop", "bare", "serial")}
    vs_bare, vs_serial = ([f["loop"][0] / f[a][0] for f in results[1:] if a in f] for a in ("bare", "serial"))
    walls, cpus = ({a: round(statistics.median(x[k] for x in taken[a]), 3) for a in taken} for k in (0, 1))
    return {
        "wall_ratio_vs_bare": round(statistics.median(vs_bare), 3),
        "wall_ratio_vs_bare_ci95": interval(vs_bare),
        "wall_ratio_vs_serial": round(statistics.median(vs_serial), 3),
        "wall_s": walls,
        "client_cpu_s": cpus,
        "wall_tokens": sum(len(ids) for tree in trees for _, ids in tree.requests),
        "pairs": pairs,
    }


def on_server(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the parts that need a server, all on the same one."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        # In a separate process, so that torch does not count in the memory of this one.
        likes, spawn = {"tags": DIALECT.tags, "tag_bias": 3.0}, multiprocessing.get_context("spawn")
        maker = spawn.Process(target=random_llama, args=(Path(directory),), kwargs=likes)
        maker.start()
        maker.join()
        with apr.Server(directory, max_total_tokens=65536, context_length=2048) as server:
            if "walls" in options.parts:
                results |= asyncio.run(walls(server.url, options.pairs, console))
            if "throughput" in options.parts:
                levels = track(sorted(options.levels), "levels", console=console)
                ran = {str(n): asyncio.run(throughput(server, n, DIALECT, **FREE)) for n in levels}
                results |= {"throughput": {n: x["tokens_per_s"] for n, x in ran.items()}, "levels": ran}
    return results


def missed(results: dict[str, Any]) -> list[str]:
    """The bars that are missed, one sentence each."""
    over = [f"{name} {results[name]} > {bar}" for name, bar in BARS.items() if results.get(name, 0) > bar]
    levels = results.get("levels", {}).items()
    return over + [f"{n} in parallel: not all valid" for n, x in levels if x["valid"] != x["trajectories"]]


def environment() -> dict[str, Any]:
    return {
        "peak_rss_mb": peak_rss_mb(),
        "hardware": hardware(),
        "versions": versions("sgl-apr", "sglang", "torch", "aiohttp"),
    }


def show(results: dict[str, Any]) -> None:
    console = Console(width=150)
    table = Table("figure", "value", title="The fork-join loop")
    for name, value in results.items():
        if name not in ("levels", "throughput"):
            table.add_row(name, json.dumps(value))
    console.print(table)
    if levels := results.get("levels"):
        table = Table("concurrency", *next(iter(levels.values())), title="Trajectories that decode freely")
        for n, level in levels.items():
            table.add_row(n, *map(json.dumps, level.values()))
        console.print(table)


def main() -> int:
    """Print tables, or JSON; with --check, status 1 if a bar is missed."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=kind)
    add, parts, levels = parser.add_argument, ["overhead", "walls", "throughput"], [1, 16, 64, 256, 1000]
    add("--parts", nargs="+", choices=parts, default=parts, help="what to measure (default: everything)")
    add("--runs", type=int, default=1000, help="trajectories for the overhead (default: %(default)s)")
    add("--pairs", type=int, default=20, help="pairs for the wall times (default: %(default)s)")
    add(
        "--levels",
        nargs="+",
        type=int,
        default=levels,
        help="numbers of concurrent trajectories (default: %(default)s)",
    )
    add("--json", action="store_true", help="one JSON object on stdout instead of tables")
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    console = Console(stderr=True)
    results: dict[str, Any] = {}
    if "overhead" in options.parts:
        repetitions = track(range(REPETITIONS), "overhead", console=console)
        results |= asyncio.run(loop_times(options.runs, repetitions))
    if options.parts != ["overhead"]:
        results |= on_server(options, console)
    results |= environment()
    return finish(results, missed(results), show, options)


if __name__ == "__main__":
    sys.exit(main())
