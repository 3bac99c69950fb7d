"""GRPO through a real server: whose weights reply, what is learned from, and that a killed run continues."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.problems import generate_problems
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training import grpo
from sgl_apr.training.collate import Collator, log_probabilities
from sgl_apr.training.config import GrpoConfig, Model, Rollouts, Updates
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.training_tree import build_training_tree

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def begin(tmp_path_factory) -> Path:
    return countdown_llama(tmp_path_factory.mktemp("begin"), apr.dialect("spawn").tags, layers=1, hidden=32)


def config(begin: Path, **more) -> GrpoConfig:
    rollouts = Rollouts(problems=2, group=2, tokens=200, branch_tokens=30, width=3, mode="parallel", **more)
    return GrpoConfig(Model(path=str(begin)), "spawn", rollouts, Updates(steps=2, batch=4096))


def test_replies_better_than_their_group_become_likelier(begin: Path):
    tokenizer = HfTokenizer(begin)
    eos = min(tokenizer.eos_ids)
    model = AutoModelForCausalLM.from_pretrained(begin, dtype=torch.float32)
    problem = next(generate_problems(1, "train", numbers=(4,)))
    made = [asyncio.run(demonstration(problem, tokenizer, seed=seed)) for seed in (1, 2, 3)]

    def likelihoods() -> list[float]:
        with torch.no_grad():
            batches = (Collator()([build_training_tree([t], eos=eos)]) for t in made)
            return [float(log_probabilities(model, batch).sum()) for batch in batches]

    before = likelihoods()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    norm, agreement = grpo.update_policy(model, optimizer, made, [1.0, -1.0, 0.0], eos, config(begin))
    assert norm > 0
    assert -1 <= agreement <= 1
    after = likelihoods()
    better, worse = (now - then for now, then in zip(after[:2], before[:2], strict=True))
    assert better - worse > 0.01


def test_branches_have_the_configured_weight(begin: Path):
    """With weight 0 a step is that of the trunks alone, and its length is the rate."""
    tokenizer = HfTokenizer(begin)
    eos = min(tokenizer.eos_ids)
    problem = next(generate_problems(1, "train", numbers=(4,)))
    made = [asyncio.run(demonstration(problem, tokenizer, seed=seed)) for seed in (1, 2)]

    def step(branches: float) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(begin, dtype=torch.float32)
        before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        asked = replace(config(begin), updates=Updates(branches=branches, batch=4096))
        grpo.update_policy(model, optimizer, made, [1.0, -1.0], eos, asked)
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    model = AutoModelForCausalLM.from_pretrained(begin, dtype=torch.float32)
    for trajectory, advantage in zip(made, (1.0, -1.0), strict=True):
        trunk = next(
            t
            for t in build_training_tree([trajectory], eos=eos, separate_contexts=True).split()
            if not trajectory.spans[t.spans[0]].path
        )
        (-advantage * log_probabilities(model, Collator()([trunk])).sum()).backward()
    expected = -torch.cat([p.grad.flatten() for p in model.parameters()])
    trunks, complete = step(0.0), step(1.0)
    assert torch.nn.functional.cosine_similarity(trunks, expected, dim=0) > 0.9999
    assert trunks.norm() == pytest.approx(0.1, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(trunks, complete, dim=0) < 0.99


def test_equal_rewards_change_nothing(begin: Path):
    tokenizer = HfTokenizer(begin)
    model = AutoModelForCausalLM.from_pretrained(begin, dtype=torch.float32)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    made = [asyncio.run(demonstration(p, tokenizer, seed=0)) for p in generate_problems(2, "train")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    assert grpo.update_policy(model, optimizer, made, [0.0, 0.0], min(tokenizer.eos_ids), config(begin)) == (
        0,
        0,
    )
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


class Killed(Exception):
    pass


@pytest.mark.server
@pytest.mark.slow
def test_the_server_answers_with_the_weights_of_the_step(
    begin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The log-probabilities of each reply are those of the model that is then updated; no cache of old weights is left."""
    seen: list[float] = []
    learn = grpo.update_policy

    def compared(model, optimizer, trajectories, advantages, eos, config):
        for trajectory in trajectories:
            found = build_training_tree([trajectory], eos=eos)
            reported = [x for c in trajectory.calls for x in c.logprobs or ()]
            with torch.no_grad():
                mine = log_probabilities(model, Collator()([found])).numpy()
            assert len(reported) == len(mine)
            seen.append(float(np.abs(np.sort(reported) - np.sort(mine)).max()))
        return learn(model, optimizer, trajectories, [1.0, -1.0] * (len(trajectories) // 2), eos, config)

    asked = grpo.attempt_problems

    async def unconstrained(*args, **options):
        return await asked(*args, **{**options, "constrain": False, "mode": "auto", "logprobs": True})

    monkeypatch.setattr(grpo, "update_policy", compared)
    monkeypatch.setattr(grpo, "attempt_problems", unconstrained)
    asked_for = replace(config(begin), updates=Updates(steps=3, batch=4096, rate=0.05))
    model = grpo.train(asked_for, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["weights"] for line in lines] == ["default", "1", "2"]
    assert len(seen) == 12
    assert max(seen) < 1e-3
    first = AutoModelForCausalLM.from_pretrained(begin).state_dict()
    assert any(
        not torch.equal(p, first[n])
        for n, p in AutoModelForCausalLM.from_pretrained(model).state_dict().items()
    )


@pytest.mark.server
@pytest.mark.slow
def test_a_killed_run_continues(begin: Path, tmp_path: Path):
    def kill(update: grpo.GrpoStepLog) -> None:
        raise Killed

    with pytest.raises(Killed):
        grpo.train(config(begin), tmp_path, kill)
    grpo.train(config(begin), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]


@pytest.mark.server
@pytest.mark.slow
def test_weights_that_cannot_be_loaded_are_an_error(server, tmp_path: Path):
    with pytest.raises(apr.EngineError, match="did not load"):
        asyncio.run(grpo.load_weights(server.url, tmp_path / "nothing", "1"))


def test_a_configuration_without_a_model_is_an_error(tmp_path: Path):
    from sgl_apr.training.config import load_config

    path = tmp_path / "rl.toml"
    path.write_text("[rollouts]\ngroup = 4\n")
    with pytest.raises(apr.AprError, match="model is missing"):
        load_config(GrpoConfig, path)
