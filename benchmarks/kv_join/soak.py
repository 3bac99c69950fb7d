"""Forks, joins, aborts and evictions at random, against a server that checks its memory at every step and dies of a leak.

python -m benchmarks.kv_join.soak [--json] [--count 5000] [--seed 0] [--pool 1200] [--at-once 12] [--sample 300] [--log FILE]

Nothing may be wrong in its log, no token may be held when it is idle, a join whose branches are gone has to be a
409, the same text in a line may not find what was joined, and a sample of the answers is compared with transformers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

import sgl_apr as apr
from sgl_apr.training.models import random_llama
from sgl_apr.trajectory.join_layout import (
    Layout,
    commit_prompts,
    dense_mask,
    extend_layout,
    join_branches,
    layout_positions,
)

ENVIRONMENT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_TEST_RETRACT": "1",  # requests have to make room and begin anew, every so many steps
    "SGLANG_TEST_RETRACT_INTERVAL": "11",
}
VIOLATION = re.compile(r"Traceback|leak|invariant|AssertionError|CRITICAL", re.IGNORECASE)
RETRACTED = re.compile(r"#retracted_reqs: (\d+)")
LONGEST = 400  # tokens of a prompt: what grows longer is forgotten
YOUNG = 1000  # operations that are not counted, while there are only short prompts
VOCABULARY = range(10, 400)
NEAR = 1e-3  # by how much a logit may be below the highest one, where both round


@dataclass(frozen=True, slots=True)
class SoakSequence:
    """Tokens that are or were in the cache; what of them was joined, as a layout without its tail."""

    ids: tuple[int, ...]
    joined: Layout = ()

    def grown(self, more: Sequence[int]) -> SoakSequence:
        return SoakSequence((*self.ids, *more), self.joined)


@dataclass(slots=True)
class Fork:
    trunk: SoakSequence
    branches: list[SoakSequence]

    def joined(self) -> SoakSequence:
        """Both with all branches behind one another."""
        trunk = self.trunk
        layout = join_branches(trunk.joined, len(trunk.ids), [(b.joined, len(b.ids)) for b in self.branches])
        assert layout is not None, "every branch begins with its trunk"
        return SoakSequence(trunk.ids + sum((b.ids[len(trunk.ids) :] for b in self.branches), ()), layout)


@dataclass(frozen=True, slots=True)
class Answer:
    """To `sequence`: `ids` were decoded greedily, of whose prompt `cached` tokens were found."""

    sequence: SoakSequence
    ids: tuple[int, ...]
    cached: int


class Lost(Exception):
    """409: what is to be joined is not in the cache."""


class Wrong(Exception):
    """What no server may do."""


@dataclass(slots=True)
class Soak:
    """What the operations have left, for others to go on from, and what came of them.

    `unread` was joined and never sent in a line, `lines` was; `marks` are operations begun, wall seconds and
    processor seconds of the server, five times; `computed` counts tokens that were not found in the cache.
    """

    session: aiohttp.ClientSession
    url: str
    sequences: deque[SoakSequence] = field(default_factory=lambda: deque(maxlen=24))
    forks: deque[Fork] = field(default_factory=lambda: deque(maxlen=24))
    unread: deque[SoakSequence] = field(default_factory=lambda: deque(maxlen=24))
    lines: list[tuple[int, ...]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    marks: list[tuple[int, float, float]] = field(default_factory=list)
    computed: int = 0

    async def send(self, sequence: SoakSequence, new: int, **fields: Any) -> Answer:
        """Raises `Lost`, or `Wrong` for any other error."""
        sampling: dict[str, Any] = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        if layout := extend_layout(sequence.joined, len(sequence.ids)):
            sampling["custom_params"] = {"apr_layout": json.dumps(layout)}
        body = {"input_ids": sequence.ids, "sampling_params": sampling, **fields}
        async with self.session.post(f"{self.url}/generate", json=body) as response:
            if response.status == 409 and sequence.joined:
                raise Lost
            if response.status != 200:
                raise Wrong(f"{response.status}: {(await response.text())[:200]}")
            found = await response.json()
        ids, meta = tuple(found["output_ids"]), found["meta_info"]
        if len(ids) != new or meta["prompt_tokens"] != len(sequence.ids):
            raise Wrong(
                f"{len(ids)} tokens of {new}, prompt of {meta['prompt_tokens']}, not {len(sequence.ids)}"
            )
        self.computed += len(sequence.ids) - meta["cached_tokens"] + new
        return Answer(sequence, ids, meta["cached_tokens"])

    async def keep(self, sequence: SoakSequence) -> None:
        """Commit all branches that a sequence has joined, each behind those that it needs."""
        for ranges, layout in commit_prompts(extend_layout(sequence.joined, len(sequence.ids)) or ()):
            ids = sum((sequence.ids[first:last] for first, last in ranges), ())
            await self.send(SoakSequence(ids, layout[:-1] if layout else ()), 0)

    async def forked(self, trunk: SoakSequence, rng: random.Random) -> Fork:
        """Branches that were decoded at once, each behind a header of its own."""
        heads = [trunk.grown(some(rng, 1, 3)) for _ in range(rng.randint(1, 5))]
        answers = await asyncio.gather(*(self.send(head, rng.randint(1, 12)) for head in heads))
        return Fork(trunk, [a.sequence.grown(a.ids) for a in answers])

    async def joined(self, fork: Fork, rng: random.Random, *, kept: bool) -> SoakSequence:
        """What goes on behind the branches, which are committed first if they are to be `kept`."""
        sequence = fork.joined().grown(some(rng, 1, 4))
        if kept:
            await self.keep(sequence)
        answer = await self.send(sequence, rng.randint(0, 8), **extras(rng))
        before = len(sequence.ids) - answer.cached
        tail = (extend_layout(sequence.joined, len(sequence.ids)) or (0,))[-1]
        assert isinstance(tail, int), "what follows a join is in a line"
        if before > tail:
            raise Wrong("a joined prompt was computed again")
        self.answers.append(answer)
        self.unread.append(sequence)
        return sequence.grown(answer.ids)

    def remember(self, sequence: SoakSequence) -> None:
        if len(sequence.ids) < LONGEST:
            self.sequences.append(sequence)


def some(rng: random.Random, fewest: int, most: int) -> tuple[int, ...]:
    return tuple(rng.choices(VOCABULARY, k=rng.randint(fewest, most)))


async def prefix(soak: Soak, rng: random.Random) -> None:
    sequence = SoakSequence(some(rng, 8, 60))
    await soak.send(sequence, 0)
    soak.remember(sequence)


async def fork(soak: Soak, rng: random.Random) -> None:
    soak.forks.append(await soak.forked(rng.choice(soak.sequences), rng))


async def commit(soak: Soak, rng: random.Random) -> None:
    await asyncio.gather(*(soak.send(branch, 0) for branch in rng.choice(soak.forks).branches))


async def join_as_it_is(soak: Soak, rng: random.Random) -> None:
    soak.remember(await soak.joined(rng.choice(soak.forks), rng, kept=False))


async def join_what_was_kept(soak: Soak, rng: random.Random) -> None:
    soak.remember(await soak.joined(rng.choice(soak.forks), rng, kept=True))


async def nest(soak: Soak, rng: random.Random) -> None:
    """One branch forks and joins its own before the others are joined."""
    outer = rng.choice(soak.forks)
    number = rng.randrange(len(outer.branches))
    inner = await soak.forked(outer.branches[number], rng)
    grown = await soak.joined(inner, rng, kept=True)
    if len(grown.ids) < LONGEST:
        outer.branches[number] = grown


async def go_on(soak: Soak, rng: random.Random) -> None:
    sequence = rng.choice(soak.sequences).grown(some(rng, 1, 6))
    answer = await soak.send(sequence, rng.randint(1, 8), **extras(rng))
    soak.answers.append(answer)
    soak.remember(sequence.grown(answer.ids))


async def join_what_never_was(soak: Soak, rng: random.Random) -> None:
    trunk = rng.choice(soak.sequences)
    await must_be_lost(
        soak, Fork(trunk, [trunk.grown(some(rng, 2, 9)) for _ in range(3)]).joined().grown((9,))
    )


async def join_with_another_salt(soak: Soak, rng: random.Random) -> None:
    await must_be_lost(soak, rng.choice(soak.forks).joined().grown((9,)), cache_salt=str(rng.random()))


async def must_be_lost(soak: Soak, sequence: SoakSequence, **fields: Any) -> None:
    try:
        await soak.send(sequence, 1, **fields)
    except Lost:
        return
    raise Wrong("branches that nobody computed were joined")


async def read_in_a_line(soak: Soak, rng: random.Random) -> None:
    """The same tokens without the layout: of a join at most its first branch is a prefix of them."""
    if not soak.unread:
        return
    sequence = soak.unread.popleft()
    known = max(begins(sequence.joined), *(same(line, sequence.ids) for line in soak.lines), 0)
    soak.lines.append(sequence.ids)
    answer = await soak.send(SoakSequence(sequence.ids), rng.randint(1, 4))
    soak.answers.append(answer)
    if answer.cached > known + 2:  # two tokens may be the same by chance
        raise Wrong(f"{answer.cached} tokens in a line were found of what was joined, {sequence.joined}")


def same(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def begins(joined: Layout) -> int:
    """How many tokens of a joined prompt were computed in a line, from its beginning."""
    total = 0
    for item in joined:
        if not isinstance(item, int):
            return total + begins(item[0])
        total += item
    return total


async def give_up(soak: Soak, rng: random.Random) -> None:
    """Abort, or just go, at any time of the answer."""
    fork = rng.choice(soak.forks)
    joined = fork.joined().grown(some(rng, 1, 40))
    sequence = rng.choice([joined, joined, fork.trunk, rng.choice(fork.branches)])
    rid = f"{rng.getrandbits(64):016x}"
    task = asyncio.create_task(soak.send(sequence, 200, rid=rid, stream=rng.random() < 0.5, **extras(rng)))
    await asyncio.wait([task], timeout=rng.uniform(0, 0.3))
    if rng.random() < 0.5:
        async with soak.session.post(f"{soak.url}/abort_request", json={"rid": rid}) as response:
            await response.read()
    else:
        task.cancel()
    (found,) = await asyncio.gather(task, return_exceptions=True)
    if sequence is joined:
        soak.unread.append(sequence)
    if isinstance(found, Lost):
        raise found


def extras(rng: random.Random) -> dict[str, Any]:
    """What has to be returned besides, now and then."""
    return rng.choice([{}, {}, {"return_logprob": True, "top_logprobs_num": 2}])


async def is_malformed(soak: Soak, rng: random.Random) -> None:
    bad = rng.choice(["[", "7", "[1e9, [[1]], 3]", "[-1, [[1]], 3]", "[1, [[1]], 9999]"])
    body = {"input_ids": some(rng, 20, 40), "sampling_params": {"custom_params": {"apr_layout": bad}}}
    async with soak.session.post(f"{soak.url}/generate", json=body) as response:
        if response.status != 400:
            raise Wrong(f"{response.status} for {bad}")


OPERATIONS: dict[Callable[[Soak, random.Random], Awaitable[None]], int] = {
    prefix: 10, fork: 20, commit: 10, join_as_it_is: 10, join_what_was_kept: 15, nest: 8, go_on: 12,
    join_what_never_was: 2, join_with_another_salt: 2, read_in_a_line: 8, give_up: 8, is_malformed: 1,
}  # fmt: skip


async def one(soak: Soak, number: int, seed: int) -> None:
    rng = random.Random(f"{seed} {number}")
    (operation,) = rng.choices(list(OPERATIONS), list(OPERATIONS.values()))
    try:
        await operation(soak, rng)
        outcome = "done"
    except Lost:
        outcome = "lost"
    except (Wrong, TimeoutError, aiohttp.ClientError) as error:
        outcome = "wrong"
        soak.wrong.append(f"{operation.__name__}: {error!r:.120}")
    soak.outcomes[f"{operation.__name__} {outcome}"] += 1


async def run(server: apr.Server, count: int, seed: int, at_once: int) -> Soak:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        soak = Soak(session, server.url)
        for number in range(8):
            await prefix(soak, random.Random(f"{seed} first {number}"))
            await fork(soak, random.Random(f"{seed} first {number}"))

        async def work(numbers: Iterator[int]) -> None:
            for number in numbers:
                if number * 5 // count == len(soak.marks):
                    soak.marks.append((number, time.perf_counter(), worked(server.pid)))
                await one(soak, number, seed)

        for numbers in (iter(range(-YOUNG, 0)), iter(range(count))):
            soak.outcomes.clear()
            await asyncio.gather(*(work(numbers) for _ in range(at_once)))
        soak.marks.append((count, time.perf_counter(), worked(server.pid)))
    return soak


def worked(pid: int) -> float:
    """Processor seconds of a process and all below it: other load on the machine does not count."""
    process = psutil.Process(pid)
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


async def held(url: str, reconnect_timeout: float = 30.0) -> int:
    """Tokens that something holds when nothing runs."""
    deadline = time.monotonic() + reconnect_timeout
    async with await apr.HttpEngine.connect(url) as engine:
        while True:
            load = await engine.load()
            if (load.running, load.waiting, load.used_tokens) == (0, 0, 0) or time.monotonic() > deadline:
                return load.used_tokens + load.running + load.waiting
            await asyncio.sleep(0.2)


def unlike(model: Any, answer: Answer) -> bool:
    """Whether a token is not the likeliest one of a forward pass under an explicit mask, with explicit positions."""
    import torch

    ids, new = [*answer.sequence.ids, *answer.ids], len(answer.ids)
    layout = extend_layout(answer.sequence.joined, len(ids)) or (len(ids),)
    sees = torch.tensor(dense_mask(layout))
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        logits = model(
            torch.tensor([ids]),
            attention_mask=mask,
            position_ids=torch.tensor([list(layout_positions(layout))]),
            use_cache=False,
        ).logits[0, -new - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    return bool((logits.max(dim=1).values - chosen > NEAR).any())


def compared(directory: Path, answers: Sequence[Answer], sample: int, seed: int) -> tuple[int, int, int]:
    """(answers compared, of them behind joins, of all how many differ)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    some = [a for a in answers if a.ids]
    some = random.Random(seed).sample(some, min(sample, len(some)))
    return len(some), sum(bool(a.sequence.joined) for a in some), sum(unlike(model, a) for a in some)


def per(count: float, what: float) -> float:
    """Zero where there was nothing: a server that died does not work."""
    return count / what if what else 0.0


def soaked(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        directory, log = Path(name), options.log or Path(name) / "log"
        random_llama(directory, seed=3)
        os.environ |= ENVIRONMENT
        flags = {"max_total_tokens": options.pool, "context_length": 1024, "radix_cache_backend": "apr"}
        with apr.Server(directory, log_path=log, **flags) as server:
            soak = asyncio.run(run(server, options.count, options.seed, options.at_once))
            try:
                tokens = asyncio.run(held(server.url))
            except apr.EngineError as error:
                tokens = -1
                soak.wrong.append(f"at the end: {error}")
        said = log.read_text(errors="replace")
        total, behind_joins, differ = compared(directory, soak.answers, options.sample, options.seed)
    violations = [line for line in said.splitlines() if VIOLATION.search(line)]
    steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(soak.marks)]
    walls, works = ([per(step[0], step[k]) for step in steps] for k in (1, 2))
    return {
        "ok": not (soak.wrong or violations or tokens or differ),
        "operations": soak.outcomes.total(),
        "outcomes": dict(sorted(soak.outcomes.items())),
        "computed_tokens": soak.computed,
        "pool_tokens": options.pool,
        "retractions": sum(int(n) for n in RETRACTED.findall(said)),
        "wrong": dict(Counter(soak.wrong).most_common(10)),
        "violations": violations[:10],
        "held_when_idle": tokens,
        "compared": {"answers": total, "behind_joins": behind_joins, "differ": differ},
        "per_second": [round(rate, 1) for rate in walls],
        "last_to_first": round(per(walls[-1], walls[0]), 3),
        "per_processor_second": [round(rate, 1) for rate in works],
        "last_to_first_per_processor_second": round(per(works[-1], works[0]), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    parser.add_argument("--count", type=int, default=5000, help="operations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pool", type=int, default=1200, help="tokens in the KV cache: eviction all the time"
    )
    parser.add_argument("--at-once", type=int, default=12, help="operations under way")
    parser.add_argument("--sample", type=int, default=300, help="answers that are compared with transformers")
    parser.add_argument("--log", type=Path, help="where the log of the server is kept")
    options = parser.parse_args()
    found = soaked(options)
    if options.json:
        print(json.dumps(found))
    else:
        table = Table("what", "found", title="soak")
        for name, value in found.items():
            rows = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
            table.add_row(name, "\n".join(rows))
        Console().print(table)
    return int(not found["ok"])


if __name__ == "__main__":
    sys.exit(main())
