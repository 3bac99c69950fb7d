"""Rows of trajectories against the requests that the engine got: each decoded token has one loss, after what it had read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sgl_apr as apr
from sgl_apr.training.collate import Collator, log_probabilities
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


@pytest.mark.parametrize(("name", "join"), [("threadweaver", "text"), ("spawn", "message")])
def test_rows_have_the_losses_and_the_gradient_of_the_tree(name: str, join: str):
    torch.manual_seed(0)
    trajectory, engine = sampled(name, 1, join=join, policy="all")
    size = 1 + max(max(request.input_ids + ids) for request, ids in engine.noted)
    config = LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).double().eval()
    tree = log_probabilities(model, Collator()([build_training_tree([trajectory], eos=EOS)])).double()
    tree.sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    values = []
    for row in build_training_rows(trajectory, eos=EOS):
        ids, begin = torch.tensor([row.prompt_ids + row.completion_ids]), len(row.prompt_ids)
        logps = model(ids).logits.log_softmax(-1)[0, begin - 1 : -1]
        values.append(logps.gather(-1, ids[0, begin:, None])[torch.tensor(row.mask).bool(), 0])
    found = torch.cat(values)
    found.sum().backward()
    torch.testing.assert_close(found.sort().values, tree.sort().values, rtol=0, atol=1e-5)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


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
