"""All dialects on a real server with random weights: in `areason` and in programs, on both grammar backends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sglang as sgl

import sgl_apr as apr
from sgl_apr.server.launch.launcher import Server
from sgl_apr.tokenizer import load_tokenizer
from sgl_apr.training.models import random_llama, smollm2

pytestmark = pytest.mark.server
every = pytest.mark.parametrize("name", apr.dialect_names())
different = pytest.mark.parametrize(  # a format that nests, one by message, one without outlines; the others take minutes together
    "name",
    [
        pytest.param(name, marks=() if name in ("multiverse", "spawn", "parallel_r1") else pytest.mark.slow)
        for name in apr.dialect_names()
    ],
)


def budget(dialect: apr.Dialect) -> apr.Budget:
    nests = dialect.max_depth > 1
    return apr.Budget(
        tokens=1000 if nests else 400,
        width=min(3, dialect.max_width),
        depth=2 if nests else 1,
        branch_tokens=240 if nests else 40,
        outline_chars=8,
    )


def replies(url: str, dialect: apr.Dialect, count: int, **options) -> list[apr.Trajectory]:
    """`count` replies, 32 at once, each of which has to fork if it can."""
    options = {"temperature": 1.5, "mode": "parallel", "budget": budget(dialect), **options}

    async def all_of_them() -> list[apr.Trajectory]:
        async with await apr.HttpEngine.connect(url) as engine:
            gate = asyncio.Semaphore(32)

            async def one(i: int) -> apr.Trajectory:
                async with gate:
                    return await apr.areason(engine, f"Question {i}: ", dialect, **options)

            return await asyncio.gather(*(one(i) for i in range(count)))

    return asyncio.run(all_of_them())


# A tag that is spelled out takes twenty tokens of the random model.
SPELLED = apr.Budget(tokens=1500, width=3, branch_tokens=40, outline_chars=8)


def check(dialect: apr.Dialect, found: list[apr.Trajectory], tokens: int | None = None) -> None:
    for t in found:
        dialect.validate(t.text)
        assert t.metrics().total <= (tokens or budget(dialect).tokens)
        assert t.token_ids is not None
        for i, span in enumerate(t.spans):
            assert all(p < i for p in (*span.parents, *span.waits_for))
    assert sum(bool(t.blocks) for t in found) >= 0.9 * len(found)


@every
def test_random_weights_follow_it(server: Server, name: str):
    dialect = apr.dialect(name)
    found = replies(server.url, dialect, 4)
    check(dialect, found)
    if dialect.max_depth > 1 and dialect.grammar.closing_literal(
        "body", "1"
    ):  # otherwise a branch ends without a tag
        assert any(len(block.path) > 1 for t in found for block in t.blocks), "some branch forked again"
    if dialect.policy == "first":
        finishes = [b.finish for t in found for b in t.blocks[0].branches]
        assert "aborted" in finishes, "the other branches were stopped"


@different
def test_in_a_program(server: Server, name: str):
    """Native forks: nested, asynchronous, and with their own context."""
    dialect = apr.dialect(name)

    @sgl.function
    def program(s, question):
        s += question + apr.reason("thought", name, mode="parallel", budget=budget(dialect), temperature=1.5)
        s += " So:" + sgl.gen("rest", max_tokens=4)

    with apr.Endpoint(server.url) as endpoint:
        states = program.run_batch([{"question": "Q: "}], backend=endpoint)
        for state in states:
            trajectory = state.get_meta_info("thought")["trajectory"]
            check(dialect, [trajectory])
            assert trajectory.text in state.text()
            assert state["rest"] is not None


def test_a_branch_with_its_own_context_shares_nothing(server: Server):
    for t in replies(server.url, apr.dialect("spawn"), 2):
        first = {call.path: call for call in reversed(t.calls) if call.path and call.phase == "branch"}
        for call in first.values():
            assert call.prompt_tokens < 24, "only the message"
        headers = [i for i, s in enumerate(t.spans) if s.role == "header"]
        assert all(t.spans[i].parents == () and t.spans[i].waits_for for i in headers)
        after = next(s for s in t.spans if s.role == "lead")
        fork = next(i for i, s in enumerate(t.spans) if s.role == "fork")
        assert fork not in t.ancestors(t.spans.index(after)), (
            "the call is not in the context of the trunk after the join"
        )


def test_the_trunk_continues_while_its_branches_run(server: Server):
    found = replies(server.url, apr.dialect("asyncthink"), 12)
    overlaps = 0
    for t in found:
        branches = [c for c in t.calls if c.phase == "branch"]
        trunk = [c for c in t.calls if c.phase == "after"]
        overlaps += any(a.started < b.ended and b.started < a.ended for a in branches for b in trunk)
    assert overlaps >= 6


@pytest.mark.parametrize("policy", ["first", "quorum:2"])
def test_a_policy_joins_before_all_have_ended(server: Server, policy: str):
    dialect = apr.dialect("threadweaver")
    found = replies(server.url, dialect, 8, policy=policy, min_width=3)
    check(dialect, found)
    finishes = [[b.finish for b in block.branches] for t in found for block in t.blocks]
    for block in finishes:
        aborted = block.count("aborted")
        assert len(block) - aborted >= min(1 if policy == "first" else 2, len(block))
    assert any("aborted" in block for block in finishes)


def test_the_server_names_the_dialect(tmp_path: Path):
    """A tokenizer with the tags of one dialect determines the dialect."""
    model = random_llama(tmp_path / "model", tags=apr.dialect("npr").tags, tag_bias=5.0)
    assert apr.dialect_for(load_tokenizer(str(model))) is apr.dialect("npr")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["xgrammar tokens", "llguidance tokens", "llguidance text"])
def test_forty_of_forty(tmp_path: Path, kind: str):
    """benchmarks.masks.mask_latency does the same with two hundred."""
    backend, mode = kind.split()
    tags = tuple(dict.fromkeys(t for n in apr.dialect_names() for t in apr.dialect(n).tags))
    model = random_llama(tmp_path / "model", tags=tags if mode == "tokens" else (), tag_bias=5.0)
    with Server(model, grammar_backend=backend) as server:
        for name in apr.dialect_names():
            small = budget(apr.dialect(name)) if mode == "tokens" else SPELLED
            check(apr.dialect(name), replies(server.url, apr.dialect(name), 40, budget=small), small.tokens)
        if backend == "xgrammar":
            plain = random_llama(tmp_path / "plain")
            tokenizer = load_tokenizer(str(plain))
            with pytest.raises(apr.GrammarError, match="is not one token of this tokenizer"):
                apr.run(server.url, "Q: ", "threadweaver", tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_follows_every_dialect():
    tags = tuple(dict.fromkeys(t for n in apr.dialect_names() for t in apr.dialect(n).tags))
    with Server(smollm2(tags, label="every-dialect"), max_total_tokens=16384) as server:
        for name in apr.dialect_names():
            small = apr.Budget(tokens=260, width=2, branch_tokens=12, outline_chars=16)
            found = replies(server.url, apr.dialect(name), 4, temperature=1.0, budget=small, max_blocks=1)
            check(apr.dialect(name), found)
            metrics = [t.metrics() for t in found]
            closers = sum(m.closers_decoded for m in metrics), sum(m.closers_injected for m in metrics)
            print(f"{name}: {len(found)} valid, closers decoded, injected: {closers}", flush=True)
