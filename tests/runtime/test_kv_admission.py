"""Trajectories start in order, while what they are expected to need fits into the KV cache."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.engine.base import Load
from sgl_apr.runtime.kv_admission import POOL_SHARE, PRIOR_TOKENS, KvAdmission, KvEstimate, Slot
from tests.support.threadweaver_traces import TAGS

POOL = 2000
PROMPT = "Q000: "


class Batch:
    """Runs prompts on an engine that writes as many tokens as a prompt's number says, and counts what runs at once."""

    def __init__(self, pool: int, tokens: int) -> None:
        self.max_active, self.tokens, self.order = 0, tokens, list[str]()
        self.engine = apr.ScriptedEngine(self.script, apr.ByteTokenizer(TAGS))
        self.engine.loads = Load(running=0, waiting=0, used_tokens=0, max_tokens=pool)

    def script(self, request: apr.Request, prompt: str) -> apr.Reply:
        self.order.append(prompt)
        self.max_active = max(self.max_active, len(self.engine.active) + 1)
        return apr.Reply("x" * self.tokens, delay=0)

    def run(self, path: Path, problems: int, **options: Any) -> apr.Outcomes:
        prompts = {f"p{i}": f"Q{i:03d}: " for i in range(problems)}
        return asyncio.run(
            apr.arun_many(self.engine, prompts, path / "out.jsonl", mode="sequential", **options)
        )


def test_no_more_run_than_fit(tmp_path: Path):
    batch = Batch(POOL, tokens=50)
    outcomes = batch.run(tmp_path, 50, budget=apr.Budget(tokens=100), concurrency=50)
    assert len(outcomes.finished) == 50
    assert batch.order == sorted(batch.order), "in the order of the problems"
    # At first each counts all that it may write. Then it counts what the others wrote, and more run at once.
    first = int(POOL_SHARE * POOL / (len(PROMPT) + 100))
    learned = int(POOL_SHARE * POOL / (len(PROMPT) + 50))
    assert (
        first < batch.max_active <= learned + 5
    )  # prompts share their first letter, so a part of each is cached


def test_a_large_cache_and_an_unknown_one_limit_nothing(tmp_path: Path):
    batch = Batch(1 << 20, tokens=3)
    batch.run(tmp_path, 40, concurrency=32)
    assert batch.max_active == 32

    class Silent(apr.ScriptedEngine):
        async def load(self) -> Load:
            raise apr.EngineError("no load", 404)

    (tmp_path / "silent").mkdir()
    silent = Batch(POOL, tokens=3)
    silent.engine = Silent(silent.script, apr.ByteTokenizer(TAGS))
    silent.run(tmp_path / "silent", 40, concurrency=32)
    assert silent.max_active == 32


def test_one_that_is_larger_than_the_cache_runs_alone(tmp_path: Path):
    batch = Batch(100, tokens=110)
    outcomes = batch.run(tmp_path, 5, budget=apr.Budget(tokens=400), concurrency=5)
    assert len(outcomes.finished) == 5
    assert batch.max_active == 1


def test_a_large_one_is_not_overtaken():
    """Small ones arrive all the time. One that needs nearly all of the cache still starts in its turn."""

    async def go() -> list[int]:
        admission, started = KvAdmission(100), list[int]()
        admission.pool_tokens = 1000

        async def one(number: int, tokens: int) -> None:
            async with admission.slot(tokens, 0):
                started.append(number)
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(one(i, 890 if i == 10 else 100)) for i in range(30)]
        await asyncio.gather(*tasks)
        assert (admission.running, admission.waiting) == (0, 0)
        return started

    assert asyncio.run(go()) == list(range(30))


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_cancelled_all_others_run(seed: int):
    """No place is lost, none is used twice, and what runs is never expected to need more than fits."""

    async def go() -> None:
        rng = random.Random(seed)
        admission, held, ended = KvAdmission(rng.randint(1, 6)), dict[int, int](), set[int]()
        admission.pool_tokens = 1000

        async def one(number: int) -> None:
            tokens = rng.choice([1, 100, 300, 900, 5000])
            async with admission.slot(tokens, 0):
                held[number] = tokens
                assert len(held) <= admission.concurrency
                assert len(held) == 1 or sum(held.values()) <= POOL_SHARE * 1000
                try:
                    await asyncio.sleep(rng.random() / 500)
                finally:
                    del held[number]
            ended.add(number)

        tasks = [asyncio.create_task(one(number)) for number in range(30)]
        cancelled = set(rng.sample(range(30), 10))
        for number in cancelled:
            await asyncio.sleep(0)
            tasks[number].cancel()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert ended >= set(range(30)) - cancelled
        assert (admission.running, admission.waiting) == (0, 0)
        assert not admission.must_wait(10**6, 0)

    asyncio.run(go())


def test_the_estimate_follows_what_ended():
    estimate, dialect = KvEstimate(), apr.dialect("threadweaver")
    slot, small = Slot(1000, 4096), Slot(10, 7)
    assert estimate.tokens(slot) == 1000 + PRIOR_TOKENS
    assert estimate.tokens(small) == 17, "it cannot write more"

    def reply(words: int, prompt: int, cached: int) -> apr.Trajectory:
        engine = apr.ScriptedEngine(lambda request, text: "x" * words, apr.ByteTokenizer(dialect.tags))
        engine._cache = [tuple(b"p" * cached)]
        return asyncio.run(apr.areason(engine, "p" * prompt, dialect, mode="sequential"))

    known, new = reply(100, prompt=100, cached=75), reply(20, prompt=100, cached=0)
    for _ in range(80):
        estimate.record(known)
    assert estimate.tokens(slot) == pytest.approx(250 + 100)
    assert estimate.tokens(small) == pytest.approx(2.5 + 7)
    for _ in range(300):
        estimate.record(new)
    assert estimate.tokens(slot) == pytest.approx(1000 + 20, rel=0.05)
