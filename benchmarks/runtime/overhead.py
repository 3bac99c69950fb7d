"""What the loop costs beside the engine, and how many trajectories a process carries; it judges no model."""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
from sgl_apr.engine.base import TokenSink
from sgl_apr.formats.masks.writer import GrammarBackend
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.training.models import random_llama

DIALECT = apr.dialect("threadweaver")
BARS = {"loop_overhead_us": 200, "wall_ratio_vs_bare": 1.05, "wall_ratio_vs_serial": 1.0}  # at the most
WIDTHS = (4, 5, 6, 8)  # of the trajectories that run side by side for the wall times
FORK: dict[str, Any] = {"mode": "parallel", "temperature": 1.0}
FORCED = FORK | {"budget": apr.Budget(tokens=1600), "max_blocks": 1}
FREE = FORK | {"budget": apr.Budget(tokens=160, width=4, outline_chars=8)}
WHOLE, NOTHING, EACH = 1 << 30, 0, 1  # ids passed on at a time
EXAMPLES = """examples:
  python -m benchmarks.runtime.overhead --json --check
  python -m benchmarks.runtime.overhead --parts overhead
  python -m benchmarks.runtime.overhead --parts walls throughput --pairs 2 --levels 1 16    # a short trial"""


def script(tokenizer: Tokenizer, width: int, tokens: int) -> Iterator[tuple[int, ...]]:
    """What a model would write: a fork, branches of so many tokens each, a conclusion and an answer."""
    rng, encode = random.Random(width), tokenizer.encode

    def words(count: int) -> str:
        return " ".join(rng.choices(["the", "first", "part", "is", "then", "what", "we", "know"], k=count))

    outlines = "".join(f"<Outline>{k + 1}: {words(2)}</Outline>\n" for k in range(width))
    yield tuple(encode(f"{words(8)}<Parallel>\n<Outlines>\n{outlines}</Outlines>"))
    for _ in range(width):
        yield (*encode(words(tokens))[: tokens - 1], *encode("</Thread>"))
    yield (*encode(f"<Conclusion>{words(6)}</Conclusion>\n</Parallel>{words(8)}"), min(tokenizer.eos_ids))


class Scripted:
    """An engine without latency: answers in the order of a script, and the same ids alike ever after.

    `requests` are what it was asked for the first time, `prefix` is what it last forked behind. `calls` and
    `seconds` are how often it was asked, and the time that it took; it passes on `chunk` ids at a time.
    """

    grammar_backend: GrammarBackend = "llguidance"
    supports_seeds, context, joins_kv, chunk = False, None, False, WHOLE

    def __init__(self, tokenizer: Tokenizer, answers: Iterator[tuple[int, ...]]) -> None:
        self.tokenizer, self._script, self.calls, self.seconds = tokenizer, answers, 0, 0.0
        self.answers: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.requests: list[apr.Request] = []
        self.prefix: Sequence[int] = ()

    async def decode(self, request: apr.Request, on_tokens: TokenSink | None = None) -> apr.Result:
        began = time.perf_counter()
        if (ids := self.answers.get(request.input_ids)) is None:
            ids = self.answers[request.input_ids] = next(self._script)
            self.requests.append(request)
        result = apr.Result(ids, "stop", len(request.input_ids), 0)
        self.calls += 1
        self.seconds += time.perf_counter() - began  # what hears the ids belongs to the loop
        if on_tokens and self.chunk:
            for k in range(0, len(ids), self.chunk):
                on_tokens(ids[k : k + self.chunk])
        return result

    async def commit(self, request: apr.Request) -> apr.Result:
        self.calls += 1
        return apr.Result((), "length", len(request.input_ids), 0)

    async def fork(self, request: apr.Request, size: int) -> tuple[apr.Result, list[Scripted]]:
        self.prefix = request.input_ids
        return await self.commit(request), [self] * size

    async def release(self) -> None: ...

    async def abort(self, rid: str) -> None: ...

    async def load(self) -> apr.Load:
        return apr.Load(running=0, waiting=0, used_tokens=0, max_tokens=1 << 30)


async def overhead_us(runs: int, chunk: int) -> float:
    """Microseconds of the loop per engine call: a fork into 4, answered at once."""
    tokenizer = apr.ByteTokenizer(DIALECT.tags)
    engine = Scripted(tokenizer, script(tokenizer, 4, 32))
    engine.chunk = chunk
    found: list[float] = []
    for _ in range(runs + 20):
        engine.calls, engine.seconds, began = 0, 0.0, time.perf_counter()
        trajectory = await apr.areason(engine, "Question: ", DIALECT, **FORCED)
        found.append((time.perf_counter() - began - engine.seconds) / engine.calls * 1e6)
    assert engine.calls == 7, "trunk, commit, 4 branches, conclusion"
    assert DIALECT.is_valid(trajectory.text)
    return round(statistics.median(found[20:]), 1)  # the first ones lower the grammars


@dataclass(frozen=True)
class Tree:
    """A trajectory known beforehand: what trunk, commit, branches and conclusion send and get."""

    prompt: tuple[int, ...]
    requests: list[tuple[dict[str, Any], tuple[int, ...]]]


async def recorded(tokenizer: Tokenizer, width: int) -> Tree:
    """All that the loop asks of an engine for one fork into so many, with grammars that force the answers."""
    engine = Scripted(tokenizer, script(tokenizer, width, 48))
    prompt = tuple(tokenizer.encode(f"Question {width}: ", add_special_tokens=True))
    assert DIALECT.is_valid((await apr.areason(engine, prompt, DIALECT, **FORCED)).text)

    def known(request: apr.Request) -> tuple[dict[str, Any], tuple[int, ...]]:
        answer = engine.answers[request.input_ids]
        sampling = {
            "skip_special_tokens": False,
            **request.sampling,
            "max_new_tokens": request.max_tokens,
            "stop_token_ids": list(request.stop_ids),
            "ebnf": f"start: {' '.join(f'<[{i}]>' for i in answer if i not in tokenizer.eos_ids)}\n",
        }
        return {"input_ids": list(request.input_ids), "sampling_params": sampling}, answer

    commit = {"input_ids": list(engine.prefix), "sampling_params": {"max_new_tokens": 0}}
    trunk, *others = map(known, engine.requests)
    return Tree(prompt, [trunk, (commit, ()), *others])


class ForcedEngine(apr.HttpEngine):
    """Puts the grammar that forces the known answer in place of the loop's."""

    known: dict[tuple[int, ...], tuple[str, tuple[int, ...]]]

    async def decode(self, request: apr.Request, on_tokens: TokenSink | None = None) -> apr.Result:
        grammar, answer = self.known[request.input_ids]
        result = await super().decode(replace(request, grammar=grammar), on_tokens)
        assert result.token_ids == answer
        return result


async def loop(engine: ForcedEngine, trees: Sequence[Tree]) -> None:
    """The trees through the loop, which does not know them."""
    await asyncio.gather(*(apr.areason(engine, t.prompt, DIALECT, **FORCED) for t in trees))


async def bare(url: str, trees: Sequence[Tree], at_once: bool) -> None:
    """A client that knows the trees, and nothing of this package; branches at once, or one after another."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def answer(body: dict[str, Any], expected: tuple[int, ...]) -> None:
            async with session.post(f"{url}/generate", json=body | {"stream": True}) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        data = json.loads(line[6:])
            assert tuple(data["output_ids"]) == expected

        async def whole(tree: Tree) -> None:
            trunk, commit, *branches, conclusion = tree.requests
            await answer(*trunk)
            await answer(*commit)
            if at_once:
                await asyncio.gather(*(answer(*branch) for branch in branches))
            else:
                for branch in branches:
                    await answer(*branch)
            await answer(*conclusion)

        await asyncio.gather(*map(whole, trees))


async def timed(arm: str, engine: ForcedEngine, trees: Sequence[Tree]) -> tuple[float, float]:
    """Seconds of one arm, and those of this process's CPU; the server has no prefix and no grammar cached."""
    flush = f"{engine.url}/flush_cache?timeout=30"
    async with aiohttp.ClientSession(raise_for_status=True) as session, session.post(flush):
        pass
    began, cpu = time.perf_counter(), time.process_time()
    await (loop(engine, trees) if arm == "loop" else bare(engine.url, trees, at_once=arm == "bare"))
    return time.perf_counter() - began, time.process_time() - cpu


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A bootstrap 95% confidence interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(4000))
    return round(medians[100], 3), round(medians[-101], 3)


async def walls(url: str, pairs: int, console: Console) -> dict[str, Any]:
    """The loop's wall time over the bare client's, in turn, and in every 4th pair over branches in series."""
    async with await ForcedEngine.connect(url) as engine:
        assert isinstance(engine, ForcedEngine)
        trees = [await recorded(engine.tokenizer, width) for width in WIDTHS]
        engine.known = {
            tuple(body["input_ids"]): (body["sampling_params"].get("ebnf"), answer)
            for tree in trees
            for body, answer in tree.requests
        }
        found: list[dict[str, tuple[float, float]]] = []
        for i in track(range(-1, pairs), "pairs", console=console):  # the first warms up
            arms = ["loop", "bare", *["serial"] * (i % 4 == 0)]
            found.append({arm: await timed(arm, engine, trees) for arm in arms[:: 1 if i % 2 else -1]})
    taken = {arm: [f[arm] for f in found[1:] if arm in f] for arm in ("loop", "bare", "serial")}
    vs_bare, vs_serial = ([f["loop"][0] / f[a][0] for f in found[1:] if a in f] for a in ("bare", "serial"))
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


async def throughput(url: str, at_once: int) -> dict[str, Any]:
    """Trajectories that decode freely; `wall_s` are the shortest, the median and the longest."""
    # Four rounds of few, one of many: each level takes seconds enough to be measured.
    problems = {str(i): f"Question {i}: " for i in range(max(at_once, min(4 * at_once, 128)))}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trajectories.jsonl"
        async with await apr.HttpEngine.connect(url, timeout=600) as engine:
            began = time.perf_counter()
            await apr.arun_many(engine, problems, path, DIALECT, concurrency=at_once, **FREE)
            seconds, peak = time.perf_counter() - began, peak_rss_mb()
        found = [trajectory for _, trajectory in apr.read_many(path)]
    walls, calls = [t.wall_s for t in found], [call for t in found for call in t.calls]
    return {
        "trajectories": len(problems),
        "valid": sum(DIALECT.is_valid(t.text) and bool(t.blocks) for t in found),
        "requests": len(calls),
        "tokens_per_s": round(sum(call.output_tokens for call in calls) / seconds, 1),
        "trajectories_per_s": round(len(found) / seconds, 2),
        "wall_s": [round(s, 2) for s in (min(walls), statistics.median(walls), max(walls))],
        "peak_rss_mb": peak,
    }


def peak_rss_mb() -> float:
    """The most memory of this process so far: as levels only rise, that of the last one."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def on_server(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The parts that need a server, all on one."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        # In a process of its own: torch stays out of this one, whose memory is measured.
        likes, spawn = {"tags": DIALECT.tags, "tag_bias": 3.0}, multiprocessing.get_context("spawn")
        maker = spawn.Process(target=random_llama, args=(Path(directory),), kwargs=likes)
        maker.start()
        maker.join()
        with apr.Server(directory, max_total_tokens=65536, context_length=2048) as server:
            if "walls" in options.parts:
                found |= asyncio.run(walls(server.url, options.pairs, console))
            if "throughput" in options.parts:
                levels = track(sorted(options.levels), "levels", console=console)
                ran = {str(n): asyncio.run(throughput(server.url, n)) for n in levels}
                found |= {"throughput": {n: x["tokens_per_s"] for n, x in ran.items()}, "levels": ran}
    return found


def missed(found: dict[str, Any]) -> list[str]:
    """What is not as it has to be."""
    over = [f"{name} {found[name]} > {bar}" for name, bar in BARS.items() if found.get(name, 0) > bar]
    levels = found.get("levels", {}).items()
    return over + [f"{n} at once: not all valid" for n, x in levels if x["valid"] != x["trajectories"]]


def surroundings() -> dict[str, Any]:
    return {
        "peak_rss_mb": peak_rss_mb(),
        "hardware": hardware(),
        "versions": versions("sgl-apr", "sglang", "torch", "aiohttp"),
    }


def show(found: dict[str, Any]) -> None:
    console = Console(width=150)
    table = Table("figure", "value", title="The loop")
    for name, value in found.items():
        if name not in ("levels", "throughput"):
            table.add_row(name, json.dumps(value))
    console.print(table)
    if levels := found.get("levels"):
        table = Table("at once", *next(iter(levels.values())), title="Trajectories that decode freely")
        for n, level in levels.items():
            table.add_row(n, *map(json.dumps, level.values()))
        console.print(table)


def main() -> int:
    """Print tables, or JSON; with --check, status 1 if a bar is missed."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=kind)
    add, parts, levels = parser.add_argument, ["overhead", "walls", "throughput"], [1, 16, 64, 256, 1000]
    add("--parts", nargs="+", choices=parts, default=parts, help="what to measure (default: all of it)")
    add("--runs", type=int, default=1000, help="trajectories for the overhead (default: %(default)s)")
    add("--pairs", type=int, default=20, help="for the wall times (default: %(default)s)")
    add("--levels", nargs="+", type=int, default=levels, help="at once (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object on stdout instead of tables")
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    console = Console(stderr=True)
    found: dict[str, Any] = {}
    if "overhead" in options.parts:
        ways = {"": WHOLE, "_not_streamed": NOTHING, "_token_by_token": EACH}
        for name, chunk in track(ways.items(), "overhead", console=console):
            found[f"loop_overhead_us{name}"] = asyncio.run(overhead_us(options.runs, chunk))
    if options.parts != ["overhead"]:
        found |= on_server(options, console)
    found |= surroundings()
    return finish(found, missed(found), show, options)


if __name__ == "__main__":
    sys.exit(main())
