"""GRPO through a real server: whose weights reply, what is learned from, and that a killed run continues."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.training import grpo
from sgl_apr.training.config import Model
from sgl_apr.training.grpo_config import GrpoConfig, HeldOut, Rollouts, Updates
from sgl_apr.training.grpo_log import GrpoStepLog
from sgl_apr.training.heldout import HeldOutCurve, HeldOutPoint
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.weight_sync import load_weights

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def begin(tmp_path_factory) -> Path:
    return countdown_llama(tmp_path_factory.mktemp("begin"), apr.dialect("spawn").tags, layers=1, hidden=32)


def config(begin: Path, **more) -> GrpoConfig:
    rollouts = Rollouts(
        problems=2, group=2, tokens=200, branch_tokens=30, width=3, mode="parallel", pool=50, **more
    )
    return GrpoConfig(
        Model(path=str(begin)), "spawn", rollouts, Updates(steps=2, batch=4096), HeldOut(every=0)
    )


class Killed(Exception):
    pass


@pytest.mark.server
@pytest.mark.slow
def test_the_server_answers_with_the_weights_of_the_step(begin: Path, tmp_path: Path, monkeypatch):
    """The log-probabilities of each reply are those of the model that is then updated; no cache of old weights is left."""

    def score(name: str, **options):
        return lambda trajectory, correct: float(next(rewards))

    rewards = cycle((1.0, 0.0))  # a random model is never correct, and would have nothing to learn
    monkeypatch.setattr(grpo, "reward", score)
    updates = Updates(steps=3, batch=4096, rate=0.05, epochs=2, minibatches=2)
    model = grpo.train(replace(config(begin), updates=updates), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["weights"] for line in lines] == ["default", "1", "2"]
    assert all(line["norm"] > 0 and line["logprob_error"] < 1e-3 for line in lines)
    assert all(line["kl"] > 0 for line in lines)
    first = AutoModelForCausalLM.from_pretrained(begin).state_dict()
    assert any(
        not torch.equal(p, first[n])
        for n, p in AutoModelForCausalLM.from_pretrained(model).state_dict().items()
    )


@pytest.mark.server
@pytest.mark.slow
def test_a_run_on_several_tasks_has_a_held_out_curve_and_ends_when_it_is_flat(
    begin: Path, tmp_path: Path, monkeypatch
):
    tasks = {"countdown:3": 0.5, "countdown:3,unsolvable": 0.5}
    rollouts = replace(config(begin).rollouts, tasks=tasks, pool=40)
    heldout = HeldOut(problems=4, every=1, window=1)
    settings = replace(
        config(begin),
        rollouts=rollouts,
        updates=Updates(steps=9, batch=4096, rate=1e-9, branch_credit="own"),
        heldout=heldout,
    )
    seen = list[HeldOutPoint]()
    grpo.train(settings, tmp_path / "run", on_heldout=seen.append)
    assert [point.step for point in seen] == [0, 1]  # nothing was learned, so the curve is flat
    assert set(seen[0].accuracy_by_task) == {"countdown:3", "countdown:3,unsolvable"}
    assert seen[0].accuracy == seen[1].accuracy
    assert HeldOutCurve(tmp_path / "run", 1).points == seen
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 1
    monkeypatch.delattr(grpo, "Server")  # a run that has ended needs none
    assert grpo.train(settings, tmp_path / "run") == tmp_path / "run" / "model"


@pytest.mark.server
@pytest.mark.slow
def test_a_killed_run_continues(begin: Path, tmp_path: Path):
    def kill(update: GrpoStepLog) -> None:
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
        asyncio.run(load_weights(server.url, tmp_path / "nothing", "1"))


def test_a_configuration_without_a_model_is_an_error(tmp_path: Path):
    from sgl_apr.training.config import load_config

    path = tmp_path / "rl.toml"
    path.write_text("[rollouts]\ngroup = 4\n")
    with pytest.raises(apr.AprError, match="model is missing"):
        load_config(GrpoConfig, path)
