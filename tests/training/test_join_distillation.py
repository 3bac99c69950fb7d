"""Distillation of text joins into KV joins: the same losses in both trees, and a student that comes closer to its teacher."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sgl_apr as apr
from sgl_apr.cli.main import main
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.problems import generate_problems
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.config import Data
from sgl_apr.training.device import load_model
from sgl_apr.training.examples import make_examples
from sgl_apr.training.join_distillation import JoinDistillation, JoinPair
from sgl_apr.training.models import builtin_path
from sgl_apr.training.models.countdown import countdown_llama

EOS = 0
DATA = Data(dialects=("threadweaver",), problems=24, numbers=(4,), window=1024, width=(2, 4))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgl_apr.training.examples.CHUNK_SIZE", 12)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose random weights are large, so that what it reads makes a difference."""
    tags = apr.dialect("threadweaver").tags
    path = countdown_llama(tmp_path_factory.mktemp("model"), tags, layers=2, hidden=64)
    model = load_model(path)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                weight *= 6
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["threadweaver", "multiverse", "npr"])
def test_a_pair_has_the_same_targets(name: str, path: Path):
    tokenizer = HfTokenizer(path) if name == "threadweaver" else apr.ByteTokenizer(apr.dialect(name).tags)
    problem = next(iter(generate_problems(1, "train", numbers=(4,))))
    trajectory = asyncio.run(demonstration(problem, tokenizer, seed=0, target_dialect=name))
    pair = JoinPair.from_trajectory(trajectory, EOS)
    assert np.array_equal(pair.kv.targets, pair.text.targets)
    assert np.array_equal(pair.kv.spans, pair.text.spans)
    assert pair.kv.tokens < pair.text.tokens
    decoded = [trajectory.spans[k] for k in np.unique(pair.kv.spans[pair.after_join])]
    assert "".join(span.text for span in decoded).rstrip().endswith(trajectory.answer.rstrip()[-5:])
    assert all(not span.path for span in decoded if span.parents[0] > 0 and len(trajectory.blocks) == 1)
    assert 0 < pair.after_join.sum() < len(pair.kv.targets)


def test_before_a_join_nothing_differs(path: Path):
    examples, model = make_examples(DATA, HfTokenizer(path)), load_model(path)
    objective = JoinDistillation(examples, load_model(path), EOS)
    pairs = objective.examples.chunk(0)
    loss, count = objective.loss(model, [[pair] for pair in pairs])
    assert count == sum(pair.after_join.sum() for pair in pairs) > 0
    without = [[replace(pair, after_join=np.zeros_like(pair.after_join))] for pair in pairs]
    share = count / sum(len(pair.after_join) for pair in pairs)
    mean_over_all = float(objective.loss(model, without)[0].detach())
    assert mean_over_all == pytest.approx(float(loss.detach()) * share, rel=1e-3)
    assert mean_over_all > 0


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "rate"), [(0, "2e-4"), (4, "1e-3")])
def test_a_run_brings_a_trained_student_closer(
    tmp_path: Path, rank: int, rate: str, capsys: pytest.CaptureFixture[str]
):
    """The built-in model knows this format with text joins alone."""
    config = tmp_path / "join.toml"
    config.write_text(
        '[model]\npath = "builtin"\n[data]\ndialects = ["threadweaver"]\nproblems = 24\nnumbers = [4]\nwindow = 2048\n'
        '[steps]\nobjective = "join"\ntokens = 400000\nbatch = 6144\nwarmup = 4\noptimizer = "adam"\n'
        f"lora_rank = {rank}\nrate = {rate}\n"
    )
    assert main(["train", "sft", str(config), "-o", str(tmp_path / "out"), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)["model"]
    data = replace(DATA, window=2048, seed=1)
    objective = JoinDistillation(
        make_examples(data, HfTokenizer(builtin_path())), load_model(builtin_path()), EOS
    )
    rows = [[pair] for pair in objective.examples.chunk(0)]
    with torch.no_grad():
        before, after = (float(objective.loss(load_model(p), rows)[0]) for p in (builtin_path(), trained))
    print("divergence", before, after)
    assert after < 0.7 * before
