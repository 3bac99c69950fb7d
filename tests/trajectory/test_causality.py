"""Positions and attention masks of trajectories, compared with their span graphs by brute force."""

from __future__ import annotations

import asyncio

import pytest

import sgl_apr as apr
from tests.support.dense_mask import dense_mask
from tests.support.masked_sampler import SampledEngine, masked

KV = [name for name in apr.dialect_names() if "kv" in apr.dialect(name).joins]


def sampled(name: str, seed: int) -> apr.Trajectory:
    dialect = apr.dialect(name)
    budget = apr.Budget(tokens=900, width=3, depth=min(3, dialect.max_depth))
    engine = SampledEngine(masked(name), seed=seed)
    return asyncio.run(apr.areason(engine, "Q: ", name, budget=budget, mode="parallel"))


def graph(trajectory: apr.Trajectory) -> tuple[list[int], list[list[bool]]]:
    """The longest chain before every token, and what it sees, computed from `Span.parents`."""
    spans = trajectory.spans
    ends: list[int] = []
    at: list[int] = []
    owner: list[int] = []
    for i, span in enumerate(spans):
        begun = max((ends[p] for p in span.parents), default=0)
        at += range(begun, begun + span.tokens)
        ends.append(begun + span.tokens)
        owner += [i] * span.tokens
    seen = [set(trajectory.ancestors(i)) for i in range(len(spans))]
    n = len(owner)
    return at, [[j <= i and owner[j] in seen[owner[i]] for j in range(n)] for i in range(n)]


@pytest.mark.parametrize("name", KV)
def test_positions_are_longest_chains_and_tokens_see_their_ancestors(name: str):
    deep = 0
    for seed in range(8):
        trajectory = sampled(name, seed)
        found = apr.causality(trajectory, "kv")
        at, sees = graph(trajectory)
        assert list(found.positions) == at
        assert dense_mask(found.layout) == sees
        assert found.token_ids == tuple(t for s in trajectory.spans for t in s.token_ids)
        deep = max(deep, *(len(b.path) // 2 for b in trajectory.blocks), 0)
        flat = apr.causality(trajectory)
        assert flat.positions == tuple(range(len(found.token_ids))), "text joins are sequential"
        assert not any(flat.masked_ranges)
    assert deep >= (1 if apr.dialect(name).max_depth > 1 else 0), "some nest"


def test_a_trajectory_without_one_order_is_an_error():
    with pytest.raises(apr.AprError, match="no one order"):
        apr.causality(sampled("apr", 0), "kv")
    with pytest.raises(apr.AprError, match="no one order"):
        apr.causality(sampled("pasta", 0), "kv")


def test_a_parsed_text_has_positions():
    dialect = apr.dialect("multiverse")
    read = dialect.parse(sampled("multiverse", 1).text, apr.ByteTokenizer(dialect.tags))
    found, (at, sees) = apr.causality(read, "kv"), graph(read)
    assert list(found.positions) == at
    assert dense_mask(found.layout) == sees
