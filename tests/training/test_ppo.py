"""Policy gradients: what becomes likelier, what branches are advantages, several updates for one batch, and clipping."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.problems import generate_problems
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.branch_credit import sequence_advantages
from sgl_apr.training.collate import Collator, log_probabilities
from sgl_apr.training.grpo_config import Updates
from sgl_apr.training.mask_replay import UNMASKED, MaskReplay
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.policy_samples import PolicySample
from sgl_apr.training.ppo import clipped_surrogate, update_policy
from sgl_apr.training.training_tree import build_training_tree


@pytest.fixture(scope="module")
def begin(tmp_path_factory) -> Path:
    return countdown_llama(tmp_path_factory.mktemp("begin"), apr.dialect("spawn").tags, layers=1, hidden=32)


@pytest.fixture(scope="module")
def replay(begin: Path) -> MaskReplay:
    return MaskReplay(begin, load(begin).config.vocab_size)


@pytest.fixture(scope="module")
def replies(begin: Path) -> list[apr.Trajectory]:
    problem, tokenizer = next(generate_problems(1, "train", numbers=(4,))), HfTokenizer(begin)
    return [asyncio.run(demonstration(problem, tokenizer, seed=seed)) for seed in (1, 2, 3)]


def load(begin: Path):
    return AutoModelForCausalLM.from_pretrained(begin, dtype=torch.float32)


def samples(model, reply: apr.Trajectory, advantage: float, credit: str = "group") -> list[PolicySample]:
    """The samples of a reply that was decoded by `model` without a mask."""
    advantages, found = sequence_advantages(reply, advantage, credit, {}), list[PolicySample]()
    eos = model.config.eos_token_id
    for tree in build_training_tree([reply], eos=eos, separate_contexts=True).split():
        weights = np.array([advantages[reply.spans[s].path] for s in tree.spans], dtype=np.float32)
        with torch.no_grad():
            old = log_probabilities(model, Collator()([tree])).numpy()
        if weights.any():
            found.append(PolicySample(tree, weights, old, np.full(len(weights), UNMASKED, dtype=np.int32)))
    return found


def parameters(model) -> torch.Tensor:
    return torch.cat([p.detach().clone().flatten() for p in model.parameters()])


def learn(model, replay: MaskReplay, groups, **updates):
    optimizer = torch.optim.SGD(model.parameters(), lr=updates.pop("rate", 0.05))
    settings = Updates(batch=4096, **updates)
    return update_policy(model, optimizer, groups, replay, settings, temperature=1.0)


def test_replies_better_than_their_group_become_likelier(begin: Path, replay: MaskReplay, replies):
    model = load(begin)

    def likelihoods() -> list[float]:
        with torch.no_grad():
            batches = (Collator()([build_training_tree([t], eos=replay.eos)]) for t in replies)
            return [float(log_probabilities(model, batch).sum()) for batch in batches]

    before = likelihoods()
    groups = [[samples(model, replies[0], 1.0)], [samples(model, replies[1], -1.0)]]
    statistics = learn(model, replay, groups)
    assert statistics.norm > 0
    assert -1 <= statistics.gradient_cosine <= 1
    assert statistics.logprob_error < 1e-5
    assert statistics.clipped == 0
    better, worse = (now - then for now, then in zip(likelihoods()[:2], before[:2], strict=True))
    assert better - worse > 0.01


def test_without_branch_credit_a_step_is_that_of_the_trunks(begin: Path, replay: MaskReplay, replies):
    """The length of the step is the rate."""

    def step(credit: str) -> torch.Tensor:
        model = load(begin)
        before = parameters(model)
        groups = [[samples(model, replies[0], 1.0, credit)], [samples(model, replies[1], -1.0, credit)]]
        learn(model, replay, groups, rate=0.1)
        return parameters(model) - before

    model = load(begin)
    for trajectory, advantage in zip(replies[:2], (1.0, -1.0), strict=True):
        trees = build_training_tree([trajectory], eos=replay.eos, separate_contexts=True).split()
        trunk = next(t for t in trees if not trajectory.spans[t.spans[0]].path)
        (-advantage * log_probabilities(model, Collator()([trunk])).sum()).backward()
    expected = -torch.cat([p.grad.flatten() for p in model.parameters()])
    trunks, complete = step("trunk"), step("group")
    assert torch.nn.functional.cosine_similarity(trunks, expected, dim=0) > 0.9999
    assert trunks.norm() == pytest.approx(0.1, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(trunks, complete, dim=0) < 0.99


def test_replies_without_an_advantage_change_nothing(begin: Path, replay: MaskReplay, replies):
    model = load(begin)
    before = parameters(model)
    statistics = learn(model, replay, [[samples(model, r, 0.0)] for r in replies])
    assert statistics.norm == 0
    assert torch.equal(parameters(model), before)


def test_one_batch_gives_several_updates(begin: Path, replay: MaskReplay, replies):
    """Each minibatch of each epoch is one step of the optimizer; ratios are 1 before the first one only."""
    model, steps = load(begin), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    optimizer.register_step_post_hook(lambda *_: steps.append(parameters(model)))
    groups = [[samples(model, reply, a)] for reply, a in zip(replies, (1.0, -1.0, 0.5), strict=True)]
    settings = Updates(batch=4096, epochs=2, minibatches=3, clip_ratio=0.1)
    statistics = update_policy(model, optimizer, groups, replay, settings, temperature=1.0)
    assert len(steps) == 6
    assert statistics.logprob_error < 1e-5
    assert statistics.kl > 1e-4
    assert 0 < statistics.clipped < 1


def test_ratios_beyond_the_clip_earn_nothing_more():
    log_ratios = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    clipped_surrogate(log_ratios, advantages, 0.2).sum().backward()
    earns = (log_ratios.grad != 0).tolist()
    assert earns == [False, True, True, False]  # further up, and further down, earn nothing


def test_the_temperature_and_the_mask_are_those_of_the_sampling(begin: Path, replay: MaskReplay, replies):
    """Log-probabilities that were computed at another temperature are an error at the first update."""
    model = load(begin)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    groups = [
        [samples(model, replies[0], 1.0)],
        [[]],
    ]  # a minibatch with nothing to learn is no gradient step
    for order in (groups, groups[::-1]):
        settings = Updates(minibatches=2)
        cold = update_policy(model, optimizer, order, replay, settings, temperature=0.5)
        assert cold.logprob_error > 0.1
