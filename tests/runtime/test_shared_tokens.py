"""Branches that share the tokens of their fork, on engines that sample from the masks, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace

import pytest

import sgl_apr as apr
from sgl_apr.runtime.phase_output import closing_overhead
from tests.support import virtual_time
from tests.support.masked_sampler import SampledEngine, masked

EVERY = [
    "threadweaver",
    "multiverse",
    "npr",
    "parallel_r1",
    "parathinker",
    "apr",
    "spawn",
    "asyncthink",
    "pasta",
]


class SeededEngine(SampledEngine):
    """What it decodes depends on the seed of the request alone. How long it takes depends on `speed`.

    Some requests close their text soon, others write on until a limit cuts them.
    """

    def __init__(self, tokenizer, speed: random.Random) -> None:
        super().__init__(tokenizer)
        self.speed, self.calls, self.running, self.max_running = speed, 0, 0, 0
        self.plain = self.weights.copy()

    async def decode(self, request, on_tokens=None):
        self.calls += 1
        seed = request.sampling["sampling_seed"]
        self.random = random.Random(seed * 1000 + request.resumed_tokens)
        tags = random.Random(seed).choice([0.1, 20.0, 20.0])
        for i in range(self.size):
            if self.tokenizer.backend.id_to_token(i) in (*self.tokenizer.tags, "<eos>", '"'):  # ends a topic
                self.weights[i] = tags
        received: list[int] = []
        result = await super().decode(request, received.extend)  # it decodes all at once
        self.running += 1
        self.max_running = max(self.running, self.max_running)
        try:
            for token in result.token_ids:
                await asyncio.sleep(self.speed.uniform(0.001, 0.1))
                if on_tokens:
                    on_tokens([token])
        finally:
            self.running -= 1
        return result

    async def commit(self, request):
        self.calls += 1
        await asyncio.sleep(self.speed.uniform(0.001, 0.1))
        return await super().commit(request)


def random_budget(name: str, rng: random.Random) -> apr.Budget:
    """A budget that has room for forks, whose branches need more or less than an equal part of it."""
    dialect = apr.dialect(name)
    width, depth = rng.randint(2, min(5, dialect.max_width)), rng.randint(1, min(2, dialect.max_depth))
    closing = closing_overhead(dialect, masked(name)).of(width)
    return apr.Budget(
        tokens=2 * closing + rng.randint(200, 900),
        critical_tokens=rng.choice([None, None, None, 2 * closing + rng.randint(100, 800)]),
        branch_tokens=rng.choice([None, None, rng.randint(20, 200)]),
        calls=rng.choice([None, None, rng.randint(width + 3, 40)]),
        width=width,
        depth=depth,
        blocks=2,
        outline_chars=8,
    )


def run(
    name: str, budget: apr.Budget, seed: int, speed: int, **options
) -> tuple[apr.Trajectory, SeededEngine]:
    engine = SeededEngine(masked(name), random.Random(speed))
    options = {"mode": "parallel", **({"policy": "all"} if name == "parathinker" else {}), **options}

    async def reason() -> apr.Trajectory:
        async with asyncio.timeout(100_000):  # of virtual time: nobody waits for ever
            return await apr.areason(engine, "Q: ", name, budget=budget, seed=seed, **options)

    return virtual_time.run(reason())[0], engine


@pytest.mark.parametrize("cases", [20, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EVERY)
def test_no_limit_is_exceeded_where_branches_share_tokens(name: str, cases: int):
    rng, seen = random.Random(name), Counter()
    for case in range(cases):
        budget, pacing = random_budget(name, rng), case % 2
        options = {"pacing": apr.Pacing(max_parallel=1)} if pacing else {}
        t, engine = run(name, budget, case, case, **options)
        where = (budget, case, t.text)
        apr.dialect(name).validate(t.text)
        metrics = t.metrics()
        assert t.tokens_shared
        assert metrics.total <= budget.tokens, where
        assert metrics.critical_path <= (budget.critical_tokens or budget.tokens), where
        assert engine.calls == metrics.engine_calls <= (budget.calls or engine.calls), where
        assert all(b.finish != "malformed" for block in t.blocks for b in block.branches), where
        for block in t.blocks:
            for branch in block.branches:
                decoded = sum(t.spans[i].tokens for i in branch.spans if t.spans[i].origin == "decoded")
                assert decoded <= (budget.branch_tokens or decoded), where
        seen["extended"] += any(call.continuations for call in t.calls)
        seen["forked"] += bool(t.blocks)
    print(name, dict(seen))
    assert seen["forked"] >= 0.9 * cases
    assert seen["extended"] >= 0.05 * cases


@pytest.mark.parametrize("cases", [6, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EVERY)
def test_what_branches_write_does_not_depend_on_speed(name: str, cases: int):
    rng = random.Random(name)
    for seed in range(cases):
        budget = random_budget(name, rng)
        first, second = (run(name, budget, seed, speed)[0] for speed in (1, 2))
        assert first.text == second.text, (budget, seed)
        assert first.metrics().total == second.metrics().total


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_nobody_waits_for_ever(name: str):
    """Branches that wait for tokens or for a slot end with their trajectory: where others are cut, and at a deadline.

    A trajectory that is cancelled from outside leaves no task that waits.
    """
    rng = random.Random(name)
    joins_by_itself = name not in ("asyncthink", "pasta")
    for seed in range(100):
        budget = replace(random_budget(name, rng), seconds=rng.choice([None, 2, 5, 20]))
        options = {
            "policy": rng.choice(["all", "first", "quorum:2", "deadline:3"]) if joins_by_itself else "all",
            "pacing": rng.choice([None, apr.Pacing(max_parallel=1), apr.Pacing(max_parallel=2)]),
        }
        run(name, budget, seed, seed, **options)
        engine, cancelled_after = SeededEngine(masked(name), random.Random(seed)), rng.uniform(0.01, 8)

        async def cancelled() -> None:
            work = apr.areason(engine, "Q: ", name, budget=budget, seed=seed, mode="parallel", **options)  # noqa: B023
            task = asyncio.create_task(work)
            await asyncio.wait([task], timeout=cancelled_after)  # noqa: B023
            task.cancel()
            async with asyncio.timeout(100):
                await asyncio.wait([task])
            assert asyncio.all_tasks() == {asyncio.current_task()}

        virtual_time.run(cancelled())
        assert engine.running == 0
