"""Rows of trajectories against the requests that the engine got: each decoded token has one loss, after what it had read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

import sgl_apr as apr
from sgl_apr.training.training_rows import TrainingRow, build_training_rows
from sgl_apr.training.training_tree import build_training_tree
from tests.training.test_training_tree import requests, sampled

EOS = apr.ByteTokenizer.EOS
JOINED = [
    (name, join) for name in apr.dialect_names() for join in sorted(apr.dialect(name).joins) if join != "kv"
]


def read(rows: list[TrainingRow]) -> Counter:
    """(tokens before, their positions, target) of every loss."""
    losses = Counter()
    for row in rows:
        begin, ids = len(row.prompt_ids), row.prompt_ids + row.completion_ids
        for k, loss in enumerate(row.mask, begin):
            if loss:
                losses[ids[:k], tuple(range(k)), ids[k]] += 1
    return losses


@pytest.mark.parametrize(("name", "join"), JOINED)
def test_each_decoded_token_has_one_loss_after_what_it_had_read(name: str, join: str):
    several = 0
    for seed in range(4):
        trajectory, engine = sampled(name, seed, join=join, policy="all")
        rows = build_training_rows(trajectory, eos=EOS)
        assert read(rows) == requests(engine)
        assert all(len(row.mask) == len(row.logprobs) == len(row.completion_ids) for row in rows)
        assert all(row.mask[0] for row in rows[1:]), "prompts have no loss, and completions begin with one"
        several += len(rows) > 1
    assert several


def test_the_first_row_is_that_of_the_trunk():
    trajectory, _ = sampled("threadweaver", 1, join="text")
    first, *others = build_training_rows(trajectory, eos=EOS)
    assert first.prompt_ids == trajectory.spans[0].token_ids
    assert first.completion_ids == (*trajectory.token_ids, EOS)
    assert len(others) == sum(len(block.branches) - 1 for block in trajectory.blocks)
    assert all(row.mask == (1,) * len(row.mask) for row in others)


def test_reported_log_probabilities_stand_where_their_tokens_do():
    trajectory, _ = sampled("spawn", 2)
    decoded = [list[int]() for _ in trajectory.calls]
    for span in trajectory.spans:
        if span.origin == "decoded":
            decoded[span.call] += span.token_ids
    calls = tuple(
        replace(call, logprobs=tuple(-float(i) for i in [*ids, EOS][: call.output_tokens]))
        for call, ids in zip(trajectory.calls, decoded, strict=True)
    )
    rows = build_training_rows(replace(trajectory, calls=calls), eos=EOS)
    assert len(rows) > 1
    for row in rows:
        expected = [-float(i) if loss else None for i, loss in zip(row.completion_ids, row.mask, strict=True)]
        assert list(row.logprobs) == expected


def test_branches_that_wrote_the_same_have_a_loss_each():
    text = (
        "<Parallel><Path>\nsame view\n</Path><Path>\nsame start\n</Path><Path>\nsame view\n</Path></Parallel>\n"
        "<Summary>\nboth\n</Summary>\nFinal Answer: 19"
    )
    tokenizer = apr.ByteTokenizer(apr.dialect("parallel_r1").tags)
    trajectory = apr.read(text, "parallel_r1", prompt="Q: ", tokenizer=tokenizer).trajectory
    rows = build_training_rows(trajectory, eos=EOS)
    found = build_training_tree([trajectory], eos=EOS)
    assert sum(sum(row.mask) for row in rows) == len(found.targets)
    assert max(Counter(read(rows)).values()) == 3, "what all three begin with"
    assert len(rows) == 3


def test_a_join_in_the_cache_is_an_error():
    trajectory, _ = sampled("multiverse", 1, join="kv")
    with pytest.raises(apr.AprError, match='join="text"'):
        build_training_rows(trajectory)


def test_a_trajectory_that_decoded_nothing_is_an_error():
    reading = apr.read("", "threadweaver", prompt="Q: ", tokenizer=apr.ByteTokenizer())
    with pytest.raises(apr.AprError, match="nothing was decoded"):
        build_training_rows(reading.trajectory)


def test_rows_of_a_run_without_a_fork():
    trajectory, _ = sampled("threadweaver", 0, mode="sequential")
    (row,) = build_training_rows(trajectory, eos=EOS)
    assert row.mask == (1,) * len(row.mask)
