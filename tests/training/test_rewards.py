"""Rewards and advantages, and how a naive reward is gamed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

import sgl_apr as apr
from sgl_apr.training import rewards
from sgl_apr.training.advantages import grpo, mean_only, papo
from tests.support.tool_trajectories import tool_trajectory

FORKED = """\
Let me see.
<Parallel>
<Outlines>
<Outline>1: a</Outline>
<Outline>2: b</Outline>
</Outlines>
<Thread>
1: x x x x</Thread><Thread>
2: y y y y</Thread>
</Parallel>
42"""
DIALECT = apr.dialect("threadweaver")
TOKENIZER = apr.ByteTokenizer(DIALECT.tags)
PARALLEL = DIALECT.parse(FORKED, TOKENIZER)
SEQUENTIAL = DIALECT.parse("six times seven is 42", TOKENIZER)


def spam(branches: int) -> apr.Trajectory:
    """Many empty branches, and no answer."""
    outlines = "".join(f"<Outline>{k + 1}: .</Outline>\n" for k in range(branches))
    threads = "".join(f"<Thread>\n{k + 1}: .</Thread>" for k in range(branches))
    return DIALECT.parse(
        f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}\n</Parallel>\n0", TOKENIZER
    )


def test_a_naive_reward_is_gamed_and_the_gated_ones_are_not():
    empty, honest = spam(20), PARALLEL
    assert rewards.naive_threads(empty, False) > rewards.naive_threads(honest, True) > 1
    step = 9  # in which Parallel-R1 pays for structure
    for paid in (
        rewards.gated,
        rewards.threadweaver,
        rewards.parallel_r1_product,
        lambda t, correct: rewards.parallel_r1(t, correct, step=step),
    ):
        assert paid(empty, False) <= 0 < paid(honest, True)
        assert paid(empty, False) <= paid(SEQUENTIAL, False), "more branches are no better"


def test_gated():
    ratio = PARALLEL.metrics().acceleration
    assert ratio > 0
    assert rewards.gated(PARALLEL, True) == 1 + ratio
    assert rewards.gated(PARALLEL, True, parallel=0.5) == 1 + ratio / 2
    assert rewards.gated(PARALLEL, False) == 0
    assert rewards.gated(SEQUENTIAL, True) == 1
    path = PARALLEL.metrics().critical_path
    assert rewards.gated(PARALLEL, True, parallel=0, length=2) == pytest.approx(1 - path / 500)
    assert rewards.gated(PARALLEL, True, length=1e6) == 0, (
        "a right answer is never worth less than a wrong one"
    )
    assert rewards.gated(PARALLEL, False, length=-1) == 0
    named = rewards.reward("gated", parallel=0.5, length=2)
    assert named(PARALLEL, True) == pytest.approx(1 + ratio / 2 - path / 500)


def test_results_of_tools_earn_nothing():
    """Otherwise a policy could lengthen its branches with them."""
    tooled = tool_trajectory("threadweaver")
    padding = tuple(TOKENIZER.encode("x" * 500))
    padded = replace(
        tooled,
        spans=tuple(
            replace(s, text=s.text + "x" * 500, token_ids=(*s.token_ids, *padding))
            if s.role == "observation" and s.path
            else s
            for s in tooled.spans
        ),
    )
    assert padded.metrics().acceleration > tooled.metrics().acceleration
    for paid in (
        rewards.gated,
        partial(rewards.gated, length=1.0),
        rewards.threadweaver,
        partial(rewards.apr, length=1.0, threads=1.0),
        partial(rewards.parallel_r1, step=9),
        rewards.parallel_r1_product,
        rewards.npr,
        rewards.naive_threads,
    ):
        assert paid(padded, True) == paid(tooled, True)
    assert rewards.apr(tooled, True, threads=1.0) == 1 + 2, "calls are no threads"
    assert rewards.well_formed(tooled), "a call that a limit cut breaks no rule of the dialect"


def test_threadweaver():
    assert rewards.threadweaver(SEQUENTIAL, True) == 1
    # Of 63 tokens, the 8 of the shorter thread's text are saved: the tags and numbers of threads are sequential.
    assert rewards.threadweaver(PARALLEL, True) == pytest.approx(1 + 0.5 * 8 / 63)
    assert 1 + 0.5 * min(PARALLEL.metrics().acceleration, 0.2) == 1.1, "what the causal convention would pay"
    assert rewards.threadweaver(PARALLEL, True, max_acceleration=0.01) == 1.005
    assert rewards.threadweaver(PARALLEL, False) == -1
    assert rewards.threadweaver(PARALLEL, False, wrong=0.0) == 0


def test_parallel_r1_alternates():
    def paid(trajectory, correct):
        return [rewards.parallel_r1(trajectory, correct, step=step) for step in range(20)]

    assert paid(PARALLEL, True) == ([1.0] * 8 + [1.2] * 2) * 2
    assert paid(SEQUENTIAL, True) == [1.0] * 20
    assert paid(PARALLEL, False) == [-1.0] * 20
    left = apr.Trajectory(
        (*PARALLEL.spans, apr.Span("text", "decoded", "<Thread>", (1,), (), finish="malformed")),
        "threadweaver",
    )
    assert paid(left, True) == ([1.0] * 8 + [-1.0] * 2) * 2
    assert rewards.parallel_r1_product(left, True) == 0
    without_block = apr.Trajectory(left.spans[-1:], "threadweaver")
    assert paid(without_block, True) == ([1.0] * 8 + [-1.0] * 2) * 2


def test_a_malformed_reply_earns_nothing_for_its_branches():
    broken = rewards.judged_trajectory(
        apr.read(FORKED.replace("</Thread><Thread>", "<Thread>", 1), DIALECT, tokenizer=TOKENIZER)
    )
    assert broken.blocks
    assert rewards.is_malformed(broken)
    assert not rewards.well_formed(broken)
    assert rewards.gated(broken, True) == 1 < rewards.gated(PARALLEL, True)
    assert rewards.apr(broken, True, threads=0.1) == 1
    assert rewards.npr(broken, True) is None
    assert rewards.parallel_r1_product(broken, True) == 0
    assert rewards.judged_trajectory(apr.read(FORKED, DIALECT, tokenizer=TOKENIZER)) == PARALLEL


NPR = """\
<guideline>
<plan>1: a</plan>
<plan>2: b</plan>
</guideline>
<step>
1: x
</step>
<step>
2: y
</step>
<takeaway>
z
</takeaway>
42"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", 0.0),
        (NPR, "42", -1.5),
        ("<plan>2: b</plan>\n", "", -1.0),
        ("</step>\n<step>\n2", "\n<step>\n2", -1.0),
        ("<plan>2: b", "first of all\n<plan>2: b", -0.4),
        ("</guideline>\n<step>", "</guideline>\nso\n<step>", -0.2),
    ],
)
def test_npr_format(old: str, new: str, expected: float):
    reading = apr.read(NPR.replace(old, new, 1) if old else NPR, "npr")
    assert rewards.npr_format(reading) == pytest.approx(expected)


def test_npr_penalties_add_up_and_stay_above_two():
    broken = NPR.replace("<plan>2: b", "a <plan>2: b").replace("</step>\n<step>\n2", "\n<step>\n2")
    broken = broken.replace("</guideline>\n<step>", "</guideline> b <step>")
    assert -2 < rewards.npr_format(apr.read(broken, "npr")) < -1.0


def test_apr():
    assert rewards.apr(PARALLEL, True) == 1
    metrics = PARALLEL.metrics()
    assert rewards.apr(PARALLEL, False, length=1, threads=0.1) == pytest.approx(
        0.2 - metrics.critical_path / 1000
    )


def test_an_unknown_reward_lists_the_names():
    assert rewards.reward("gated", parallel=0.5)(PARALLEL, True) == rewards.gated(
        PARALLEL, True, parallel=0.5
    )
    assert rewards.reward("parallel_r1", step=9)(PARALLEL, True) == 1.2
    with pytest.raises(apr.AprError, match="naive_threads"):
        rewards.reward("best")


def test_advantages():
    assert grpo([3.0]) == mean_only([3.0]) == [0.0]
    assert grpo([]) == []
    assert grpo([1.0, 1.0, 1.0]) == [0.0] * 3
    assert grpo([2.0, 0.0, 1.0]) == pytest.approx([1.5**0.5, -(1.5**0.5), 0.0], rel=1e-5)
    assert mean_only([2.0, 0.0, 1.0]) == [1.0, -1.0, 0.0]


def test_papo_uses_the_mean_of_a_group_and_the_deviation_of_the_batch():
    found = papo([[1.0, 0.0], [1.0, 1.0, None], [5.0]])
    std = (sum((r - 1.6) ** 2 for r in (1, 0, 1, 1, 5)) / 5) ** 0.5
    assert found[0] == pytest.approx([0.5 / std, -0.5 / std], rel=1e-5)
    assert found[1:] == [[0.0, 0.0, 0.0], [0.0]]
