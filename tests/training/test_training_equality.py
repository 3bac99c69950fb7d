"""The log-probabilities of the server against those of the training tree: the end-to-end test of training data."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import requests
import torch
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.training.collate import Collator, log_probabilities
from sgl_apr.training.grpo_config import Updates
from sgl_apr.training.mask_replay import UNMASKED, MaskReplay, RecordedGrammars, RecordingEngine
from sgl_apr.training.policy_samples import PolicySample, make_policy_samples
from sgl_apr.training.ppo import update_policy
from sgl_apr.training.training_tree import TrainingTree, build_training_tree, logprobs

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

FEW = [
    ("threadweaver", "text", 1),
    ("multiverse", "kv", 3),
    ("parallel_r1", "kv", 1),
    ("spawn", "message", 2),
]
CASES = [
    *((name, join, 1) for name in apr.dialect_names() for join in sorted(apr.dialect(name).joins)),
    ("multiverse", "text", 3),
    *FEW,
]


@pytest.fixture(scope="module")
def path(server) -> str:
    return requests.get(f"{server.url}/server_info", timeout=60).json()["model_path"]


@pytest.fixture(scope="module")
def model(path: str):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def replay(path: str, model) -> MaskReplay:
    return MaskReplay(path, model.config.vocab_size)


MIN_TOKENS = 20  # of a trajectory that is compared
TEMPERATURE = 0.8


async def sampled(
    url: str, name: str, join: str, depth: int, seed: int
) -> tuple[apr.Trajectory, RecordedGrammars]:
    """Sample a trajectory, again if the model by chance ends it after a few tokens."""
    async with await RecordingEngine.connect(url) as engine:
        budget = apr.Budget(tokens=600, width=3, branch_tokens=60, outline_chars=8, depth=depth)
        for _ in range(20):
            trajectory = await apr.areason(
                engine, f"Question {seed}: ", name, join=join, budget=budget, logprobs=True, temperature=TEMPERATURE,
                mode="auto" if name == "parathinker" else "parallel", policy="all", min_width=2,
            )  # fmt: skip
            if sum(call.output_tokens for call in trajectory.calls) > MIN_TOKENS:
                break
        return trajectory, engine.grammars


def check_log_probabilities(
    model, replay: MaskReplay, trajectory: apr.Trajectory, grammars: RecordedGrammars
) -> TrainingTree:
    """At the first update all ratios are 1: log-probabilities are those of the server. Returns the tree."""
    found = build_training_tree([trajectory], eos=model.config.eos_token_id)
    assert len(found.sources) == sum(c.output_tokens for c in trajectory.calls) > MIN_TOKENS
    assert not np.isnan(logprobs(found, [trajectory])).any()
    samples = make_policy_samples(trajectory, {span.path: 1.0 for span in trajectory.spans}, replay, grammars)
    assert sum(len(sample.tree.targets) for sample in samples) == len(found.targets)
    assert first_update_error(model, replay, samples) < 1e-3
    return found


def first_update_error(model, replay: MaskReplay, samples: list[PolicySample]) -> float:
    """The largest difference of a log-probability from the server's, where nothing is learned."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return update_policy(
        model, optimizer, [[samples]], replay, Updates(), temperature=TEMPERATURE
    ).logprob_error


@pytest.mark.parametrize(
    ("name", "join", "depth"),
    [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in dict.fromkeys(CASES)],
)
def test_log_probabilities_equal_those_of_the_server(
    server, model, replay: MaskReplay, name: str, join: str, depth: int
):
    trajectory, grammars = asyncio.run(sampled(server.url, name, join, depth, 0))
    assert trajectory.blocks
    assert all(j.by == "kv" for j in trajectory.joins)
    assert {c.weight_version for c in trajectory.calls} != {None}
    found = check_log_probabilities(model, replay, trajectory, grammars)
    if join == "kv":  # the reverse has to differ: what is behind the join sees something else
        other = build_training_tree([trajectory], eos=model.config.eos_token_id, join="text")
        behind = np.array([trajectory.spans[s].path == () for s in found.spans])
        theirs = log_probabilities(model, Collator()([other])).detach().numpy()
        ours = log_probabilities(model, Collator()([found])).detach().numpy()
        assert np.abs(theirs - ours)[behind].max() > 1e-2


@pytest.mark.slow
def test_log_probabilities_of_requests_that_continue_others(server, model, replay: MaskReplay):
    """Branches that need more than their first lease of tokens have several requests, and one call."""
    for seed in range(60):
        trajectory, grammars = asyncio.run(sampled(server.url, "asyncthink", "message", 1, seed))
        if any(call.continuations for call in trajectory.calls):
            break
    else:
        pytest.fail("no request was continued")
    check_log_probabilities(model, replay, trajectory, grammars)
    advantages = {span.path: 1.0 for span in trajectory.spans}
    samples = make_policy_samples(trajectory, advantages, replay, grammars)
    unmasked = [replace(sample, masks=np.full_like(sample.masks, UNMASKED)) for sample in samples]
    assert first_update_error(model, replay, unmasked) > 1e-2


def test_aborted_branches_have_none(server):
    """The first branch that ends aborts the others: their text is there, without log-probabilities."""
    options = {
        "budget": apr.Budget(tokens=600, width=3, branch_tokens=60),
        "logprobs": True,
        "temperature": 1.0,
    }
    for seed in range(20):
        trajectory = apr.run(server.url, f"Question {seed}: ", "parathinker", **options)
        cut = {i for i, c in enumerate(trajectory.calls) if c.logprobs is None and c.output_tokens}
        if any(s.call in cut and s.tokens for s in trajectory.spans):
            break
    found = build_training_tree([trajectory])
    reported = logprobs(found, [trajectory])
    assert np.isnan(reported).any()
    assert [trajectory.spans[s].call in cut for s in found.spans] == np.isnan(reported).tolist()


def test_a_trajectory_without_log_probabilities_is_an_error(server):
    trajectory = apr.run(server.url, "Question: ", "npr", budget=apr.Budget(tokens=60))
    with pytest.raises(apr.AprError, match="logprobs=True"):
        logprobs(build_training_tree([trajectory]), [trajectory])
