"""Metrics compared with numbers computed by hand, and identities that hold for every trace."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

import sgl_apr as apr
from tests.support.threadweaver_traces import TAGS, TRACE, traces

DIALECT = apr.dialect("threadweaver")
TOKENIZER = apr.ByteTokenizer(TAGS)


def test_by_hand():
    """`aa` FORK, a branch of 4+3+1 and one of 4+5+1 tokens, a close of 1, `bbb`; tags are one token each."""
    text = (
        "aa<Parallel>\n<Outlines>\n<Outline>1:x</Outline>\n<Outline>2:y</Outline>\n</Outlines>"
        "\n<Thread>\n1:ccc</Thread><Thread>\n2:ddddd</Thread>\n</Parallel>bbb"
    )
    fork = 2 + 2 + 2 * (1 + 2 + 1 + 1 + 1) + 1
    m = DIALECT.parse(text, TOKENIZER).metrics()
    assert m.total == 2 + fork + 1 + 8 + 10 + 1 + 1 + 3
    assert m.critical_path == m.total - 8
    assert m.acceleration == pytest.approx(8 / m.total)
    assert m.parallelism == pytest.approx(m.total / (m.total - 8))
    assert m.genuine_parallelism == pytest.approx(18 / m.total)
    assert m.longest_context == m.total
    assert (m.blocks, m.branches) == (1, 2)
    strict = DIALECT.parse(text, TOKENIZER).metrics("threadweaver")
    assert strict.critical_path == m.total - 3, "only the shorter branch's own text is saved"


@settings(max_examples=100, deadline=None)
@given(text=traces())
def test_identities(text: str):
    t = DIALECT.parse(text, TOKENIZER)
    causal, strict = t.metrics(), t.metrics("threadweaver")
    assert causal.total == len(TOKENIZER.encode(text))
    assert causal.critical_path <= strict.critical_path <= causal.total
    assert t.metrics("multiverse") == causal
    assert 0 <= causal.acceleration < 1
    assert causal.parallelism >= 1
    saved = sum(
        sum(n := [sum(t.spans[i].tokens for i in b.spans) for b in block.branches]) - max(n)
        for block in t.blocks
    )
    assert causal.critical_path == causal.total - saved


def test_a_sequential_trajectory():
    m = DIALECT.parse("no fork here", TOKENIZER).metrics()
    assert (m.total, m.critical_path, m.acceleration, m.parallelism, m.genuine_parallelism) == (
        12,
        12,
        0,
        1,
        0,
    )
    empty = DIALECT.parse("", TOKENIZER).metrics()
    assert (empty.total, empty.acceleration, empty.parallelism) == (0, 0, 1)


def test_calls_are_summed_by_phase_and_overlaps_count_once():
    t = DIALECT.parse(TRACE, TOKENIZER)
    calls = (
        apr.Call("trunk", (), 10, 0, 10, 50, 0.0, 1.0),
        apr.Call("commit", (), 61, 60, 1, 0, 1.0, 1.1),
        apr.Call("body", (1, 1), 65, 61, 4, 20, 1.1, 2.1),
        apr.Call("body", (1, 2), 65, 61, 4, 30, 1.1, 2.6),
        apr.Call("after", (), 120, 84, 1, 30, 2.6, 3.6),
    )
    m = apr.Trajectory(t.spans, t.dialect, calls, 3.6).metrics()
    assert m.engine_calls == 5
    assert m.phases["body"].calls == 2
    assert m.phases["body"].wall_s == pytest.approx(1.5)
    assert m.phases["after"].reprefilled_tokens == 120 - 84 - 1
    assert m.phases["body"].reprefilled_tokens == 0
    assert m.cached_tokens == 60 + 61 + 61 + 84
    assert calls[2].shared_tokens == 61
