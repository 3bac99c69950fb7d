"""Budgets that hold whatever is decoded, on engines that sample from the masks alone and in time that is virtual_time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

import sgl_apr as apr
from sgl_apr.runtime.phase_output import closing_overhead
from tests.support import virtual_time
from tests.support.masked_sampler import SampledEngine, masked

SYNCHRONOUS = ["threadweaver", "multiverse", "npr", "parallel_r1", "parathinker", "apr", "spawn"]
EVERY = [*SYNCHRONOUS, "asyncthink", "pasta"]


class TimedEngine(SampledEngine):
    """Takes virtual time for every step, and counts what is asked of it."""

    def __init__(self, tokenizer, seed: int, tag_weight: float, step: float) -> None:
        super().__init__(tokenizer, seed, tag_weight)
        self.step, self.calls = step, 0

    async def decode(self, request, on_tokens=None):
        self.calls += 1
        heard: list[int] = []
        result = await super().decode(request, heard.extend)
        for token in result.token_ids:
            await asyncio.sleep(self.step)
            if on_tokens:
                on_tokens([token])
        return result

    async def commit(self, request):
        self.calls += 1
        await asyncio.sleep(self.step)
        return await super().commit(request)


def random_case(name: str, rng: random.Random) -> tuple[apr.Budget, TimedEngine, dict]:
    """A budget in which something is likely to run out, most of all within a branch."""
    dialect, tokenizer = apr.dialect(name), masked(name)
    width = rng.randint(2, min(4, dialect.max_width))
    depth = rng.randint(1, min(3, dialect.max_depth))
    closing = 2 * closing_overhead(dialect, tokenizer).of(width) * (2 * depth - 1)
    step = rng.uniform(0.01, 0.1)
    budget = apr.Budget(
        tokens=closing + rng.randint(10, 300),
        critical_tokens=rng.choice([None, closing + rng.randint(5, 200)]),
        branch_tokens=rng.choice([None, rng.randint(1, 60)]),
        width=width,
        depth=depth,
        blocks=rng.choice([None, rng.randint(1, 4)]),
        calls=rng.choice([None, rng.randint(width + 3, 30)]),
        seconds=rng.choice([None, step * rng.randint(20, 300)]),
        reserve=rng.choice([0.1, 0.25, 0.5]),
        outline_chars=8,
    )
    # One that seldom closes what is open writes on until a limit cuts it.
    engine = TimedEngine(tokenizer, rng.randrange(1 << 30), rng.choice([0.5, 1.0, 1.0, 5.0]), step)
    policy = {"policy": "all"} if name == "parathinker" else {}  # its own cuts branches before a limit does
    return budget, engine, policy | {"mode": rng.choice(["auto", "parallel", "parallel", "parallel"])}


@pytest.mark.parametrize("name", EVERY)
def test_no_limit_is_ever_exceeded(name: str):
    dialect, rng, bound = apr.dialect(name), random.Random(name), Counter()
    cases = 110
    for _ in range(cases):
        budget, engine, options = random_case(name, rng)
        t, seconds = virtual_time.run(apr.areason(engine, "Q: ", name, budget=budget, **options))
        where = (budget, t.text)
        dialect.validate(t.text)
        assert t.finish != "malformed", where
        assert all(b.finish != "malformed" for block in t.blocks for b in block.branches), where
        metrics = t.metrics()
        assert metrics.total <= budget.tokens, where
        assert metrics.critical_path <= (budget.critical_tokens or budget.tokens), where
        assert len(t.blocks) <= (len(t.blocks) if budget.blocks is None else budget.blocks), where
        assert engine.calls == metrics.engine_calls <= (budget.calls or engine.calls), where
        for block in t.blocks:
            assert len(block.branches) <= (budget.width or 0), where
            assert len(block.path) <= 2 * budget.depth - 1, where
            for branch in block.branches:
                decoded = sum(t.spans[i].tokens for i in branch.spans if t.spans[i].origin == "decoded")
                assert decoded <= (budget.branch_tokens or decoded), where
        if budget.seconds is not None:
            assert seconds <= budget.seconds + engine.step * 1.001, where
        bound.update({limit.limit for limit in t.limits})
        cut = {b.outcome for block in t.blocks for b in block.branches} & {"length", "timeout"}
        extended = any(call.continuations for call in t.calls)  # a branch wrote all that it had been leased
        bound["within a branch"] += bool(cut) or extended
        bound["extended"] += extended
    print(name, dict(bound))
    assert bound["within a branch"] >= cases / 2
    assert bound["tokens"]
    assert bound["branch_tokens"]
    assert bound["seconds"]
    assert bound["critical_tokens"]


class Bounded(TimedEngine):
    """Refuses what its context does not hold, as SGLang does."""

    async def decode(self, request, on_tokens=None):
        self.check(len(request.input_ids) + request.max_tokens)
        return await super().decode(request, on_tokens)

    async def commit(self, request):
        self.check(len(request.input_ids) + 1)
        return await super().commit(request)

    def check(self, tokens: int) -> None:
        if tokens > self.context:
            raise apr.EngineError(f"{tokens} tokens exceed a context of {self.context}", 400)


@pytest.mark.parametrize("name", EVERY)
def test_a_budget_above_the_context_is_cut_to_it(name: str):
    dialect, tokenizer, rng, bound = apr.dialect(name), masked(name), random.Random(name), Counter()
    prompt = "Q: " + "?" * 20
    for _ in range(60):
        width = rng.randint(2, min(4, dialect.max_width))
        engine = Bounded(tokenizer, rng.randrange(1 << 30), rng.choice([1.0, 20.0]), 0.01)
        engine.context = (
            len(prompt) + 2 * closing_overhead(dialect, tokenizer).of(width) + rng.randint(10, 400)
        )
        budget = apr.Budget(tokens=8000, width=width, outline_chars=8)
        policy = {"policy": "all"} if name == "parathinker" else {}
        t, _ = virtual_time.run(
            apr.areason(engine, prompt, name, budget=budget, retry=apr.Retry(attempts=1), **policy)
        )
        dialect.validate(t.text)
        bound.update({limit.limit for limit in t.limits})
        bound["forked"] += bool(t.blocks)
    assert bound["context"] >= 3, "messages leave more room than branches"
    assert bound["forked"] > 10
    engine.context = len(prompt)
    with pytest.raises(apr.BudgetExceeded, match=f"the prompt has {len(prompt)} tokens"):
        virtual_time.run(apr.areason(engine, prompt, name))
