"""Without the grammar a model may write anything, anywhere: the loop ends, keeps what was written, and stays in its budget."""

from __future__ import annotations

import asyncio
import random

import pytest

import sgl_apr as apr
from tests.support import virtual_time
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
        assert t.metrics().total <= budget.tokens
        assert all(len(b.branches) <= 3 and len(b.path) <= 2 * budget.depth - 1 for b in t.blocks)
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


def forking(branches: int) -> apr.ScriptedEngine:
    """An engine whose model forks into so many branches, whatever it may."""
    outlines = "".join(f"<Outline>{i}: part {i}</Outline>\n" for i in range(1, branches + 1))

    def script(request: apr.Request, prompt: str) -> str:
        if prompt.endswith("</Thread>\n"):
            return "<Conclusion>all</Conclusion>\n</Parallel>\nDone."
        if prompt.endswith(":") and "<Thread>" in prompt:
            return " one\n</Thread>"
        return f"<Parallel>\n<Outlines>\n{outlines}</Outlines>"

    return apr.ScriptedEngine(script, apr.ByteTokenizer(apr.dialect("threadweaver").tags))


def run_unconstrained(engine: apr.ScriptedEngine, name: str = "threadweaver", **options) -> apr.Trajectory:
    return asyncio.run(apr.areason(engine, "Q", name, constrain=False, **options))


def test_the_width_of_a_budget_holds():
    engine = forking(50)
    t = run_unconstrained(engine, budget=apr.Budget(width=2))
    assert [len(block.branches) for block in t.blocks] == [2]
    assert [(hit.limit, hit.path) for hit in t.limits] == [("width", ())]
    assert len(engine.requests) == 4, "the trunk, two branches, and the text after the join"
    assert t.answer == "Done."
    assert apr.Trajectory.from_json(t.to_json()) == t
    (block,) = run_unconstrained(forking(12)).blocks
    assert len(block.branches) == 12, "without a width, the format's own holds"


@pytest.mark.parametrize("tokens", range(500, 1100, 25))
def test_fewer_branches_run_where_the_tokens_do_not_close_all(tokens: int):
    t = run_unconstrained(forking(50), budget=apr.Budget(tokens=tokens))
    assert t.metrics().total <= tokens
    run = sum(len(block.branches) for block in t.blocks)
    assert run < 50
    assert run == 0 or "tokens" in {hit.limit for hit in t.limits if not hit.path}


def test_depth_and_blocks_hold():
    def nested(request: apr.Request, prompt: str) -> str:
        number = prompt.rpartition("\n")[2].removesuffix(":") + "." if prompt.endswith(":") else ""
        outlines = "".join(f"<Outline>\n{number}{k}: part</Outline>\n" for k in (1, 2))
        return f"<Parallel>\n<Goal>\n{outlines}</Goal>"

    tags = apr.ByteTokenizer(apr.dialect("multiverse").tags)
    t = run_unconstrained(apr.ScriptedEngine(nested, tags), "multiverse", budget=apr.Budget(depth=1))
    assert {len(block.path) for block in t.blocks} == {1}
    assert ("depth", (1, 1)) in [(hit.limit, hit.path) for hit in t.limits]
    t = run_unconstrained(forking(3), budget=apr.Budget(blocks=0))
    assert not t.blocks
    assert [hit.limit for hit in t.limits] == ["blocks"]


@pytest.mark.parametrize(
    ("name", "fork"), [("asyncthink", "<FORK-{0}>do {0}</FORK-{0}>"), ("pasta", '<promise topic="do {0}"/>')]
)
def test_the_width_holds_for_branches_that_start_one_at_a_time(name: str, fork: str):
    forks = 0

    def script(request: apr.Request, prompt: str) -> apr.Reply | str:
        nonlocal forks
        if not prompt.startswith("Q: ") or prompt.endswith("<async>"):
            return apr.Reply("", delay=30)
        forks += 1
        return fork.format(forks)

    engine = apr.ScriptedEngine(script, apr.ByteTokenizer(apr.dialect(name).tags))
    t, _ = virtual_time.run(
        apr.areason(engine, "Q: ", name, constrain=False, budget=apr.Budget(width=3), max_blocks=1)
    )
    assert max(len(block.branches) for block in t.blocks) == 3
    assert "width" in {hit.limit for hit in t.limits}
