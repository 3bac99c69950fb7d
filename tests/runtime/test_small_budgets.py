"""Budgets in which no fork fits: all of it is for the text, and it is never exceeded."""

from __future__ import annotations

import asyncio
import random

import pytest

import sgl_apr as apr
from tests.support import virtual_time
from tests.support.document_strategies import document
from tests.support.masked_sampler import SampledEngine, masked

SMALL = (1, 2, 3, 4, 5, 9, 17, 33, 65, 120)
WITH_TRUNK = [name for name in apr.dialect_names() if "trunk" in apr.dialect(name).grammar.rules]


class RecordingEngine(SampledEngine):
    """Keeps how many tokens each request may decode."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.max_tokens: list[int] = []

    async def decode(self, request, on_tokens=None):
        self.max_tokens.append(request.max_tokens)
        return await super().decode(request, on_tokens)


@pytest.mark.parametrize("name", WITH_TRUNK)
@pytest.mark.parametrize("spelled", [False, True])
def test_a_sequential_reply_gets_every_token(name: str, spelled: bool):
    for tokens in SMALL:
        engine = RecordingEngine(masked(name, spelled), seed=tokens, tag_weight=1.0)
        budget = apr.Budget(tokens=tokens)
        t = asyncio.run(apr.areason(engine, "Q: ", name, mode="sequential", budget=budget))
        assert engine.max_tokens == [tokens]
        assert t.text != "..."
        assert t.metrics().total <= tokens
        apr.dialect(name).validate(t.text)


@pytest.mark.parametrize("name", WITH_TRUNK)
def test_where_no_fork_fits_every_token_is_for_text(name: str):
    for tokens in SMALL[:6]:
        engine = RecordingEngine(masked(name), seed=tokens)
        t = asyncio.run(apr.areason(engine, "Q: ", name, budget=apr.Budget(tokens=tokens)))
        assert engine.max_tokens == [tokens]
        assert t.metrics().total <= tokens
        assert not t.blocks
        apr.dialect(name).validate(t.text)


@pytest.mark.parametrize("name", WITH_TRUNK)
def test_a_critical_path_without_room_for_a_fork_is_for_text(name: str):
    engine = RecordingEngine(masked(name))
    budget = apr.Budget(critical_tokens=7)
    t = asyncio.run(apr.areason(engine, "Q: ", name, budget=budget))
    assert engine.max_tokens == [7]
    assert t.metrics().critical_path <= 7


@pytest.mark.parametrize("name", WITH_TRUNK)
@pytest.mark.parametrize("mode", ["auto", "sequential"])
def test_without_the_grammar_no_token_too_many_is_injected(name: str, mode: str):
    """The model opens forks, spells half tags and stops anywhere."""
    dialect, rng = apr.dialect(name), random.Random(name)

    def script(request: apr.Request, prompt: str) -> apr.Reply:
        text = document(dialect, rng)
        start = rng.randrange(len(text) + 1)
        return apr.Reply(text[start : start + rng.randrange(120)], end=rng.random() < 0.7)

    for i in range(50):
        engine = apr.ScriptedEngine(script, apr.ByteTokenizer(dialect.tags if i % 2 else ()))
        tokens = rng.choice([*SMALL, 200])
        budget = apr.Budget(tokens=tokens)
        t = asyncio.run(apr.areason(engine, "Q: ", dialect, budget=budget, constrain=False, mode=mode))
        assert engine.requests[0].max_tokens <= tokens
        assert t.metrics().total <= tokens, (tokens, t.text)
        if mode == "sequential":
            assert not t.blocks


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("name", WITH_TRUNK)
def test_the_filler_of_a_reply_without_time_fits(name: str, tokens: int):
    async def never(request, on_tokens=None):
        await asyncio.sleep(60)

    engine = SampledEngine(masked(name))
    engine.decode = never
    budget = apr.Budget(tokens=tokens, seconds=0.1)
    t, _ = virtual_time.run(apr.areason(engine, "Q: ", name, budget=budget))
    assert t.text == "..."[:tokens]
    assert t.metrics().total == tokens
    apr.dialect(name).validate(t.text)
