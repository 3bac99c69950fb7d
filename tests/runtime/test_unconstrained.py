"""Without the grammar a model may write anything, anywhere: the loop ends, keeps what was written, and stays in its budget."""

from __future__ import annotations

import asyncio
import random

import pytest

import sgl_apr as apr
from tests.support.document_strategies import document


@pytest.mark.parametrize("name", apr.dialect_names())
def test_anything_may_come(name: str):
    dialect, rng = apr.dialect(name), random.Random(name)

    def script(request: apr.Request, prompt: str) -> apr.Reply:
        text = document(dialect, rng)
        start = rng.randrange(len(text) + 1)
        return apr.Reply(text[start : start + rng.randrange(120)], end=rng.random() < 0.7)

    for i in range(100):
        engine = apr.ScriptedEngine(script, apr.ByteTokenizer(dialect.tags if i % 2 else ()))
        budget = apr.Budget(tokens=rng.choice([300, 600, 1500]), width=3, depth=min(2, dialect.max_depth))
        t = asyncio.run(apr.areason(engine, "Q: ", dialect, budget=budget, constrain=False))
        assert not engine.active
        assert engine.released == sum(engine.forks)
        assert apr.read(t.text, dialect).is_valid == dialect.is_valid(t.text)
        if dialect.is_valid(t.text):
            assert apr.Trajectory.from_json(t.to_json()) == t


def test_a_fork_that_just_fits():
    """Twice its tags have to fit for a fork to be offered; once is enough for one that comes by itself."""
    tokenizer, widths = apr.ByteTokenizer(apr.dialect("parallel_r1").tags), set[int]()

    def script(request: apr.Request, prompt: str) -> apr.Reply:
        return apr.Reply("" if "<Path>" in prompt else "<Parallel>")

    for tokens in range(4, 120):
        budget = apr.Budget(tokens=tokens, width=4)
        engine = apr.ScriptedEngine(script, tokenizer)
        t = asyncio.run(apr.areason(engine, "Q: ", "parallel_r1", budget=budget, constrain=False))
        assert t.metrics().total <= tokens
        widths |= {len(block.branches) for block in t.blocks}
    assert widths == {4}, "the model says no number"
