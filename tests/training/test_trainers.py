"""Our training trees and rewards in other trainers, run by their own programs; each needs its optional extra."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.problems import generate_problems
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.collate import Collator, log_probabilities
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.training_tree import build_training_tree
from sgl_apr.trajectory.trajectory import Trajectory
from tests.support.paths import EXAMPLES


def ran(*argv: object) -> str:
    """The output of an example."""
    done = subprocess.run(
        [sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "attention", ["dense", pytest.param("later", marks=pytest.mark.slow)]
)  # compiles for a minute
def test_one_row_through_the_models_own_forward(tmp_path: Path, attention: str):
    model = countdown_llama(tmp_path, apr.dialect("spawn").tags, layers=2, hidden=64)
    tokenizer = HfTokenizer(model)
    problem = next(generate_problems(1, "train", numbers=(4,)))
    made = build_training_tree(
        [asyncio.run(demonstration(problem, tokenizer, seed=0))], separate_contexts=True
    ).split()
    kind = "sdpa" if attention == "dense" else "flex_attention"
    ours = AutoModelForCausalLM.from_pretrained(model, attn_implementation=kind).eval()
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa").eval()
    with torch.no_grad():  # FlexAttention has no gradient on a CPU
        row = log_probabilities(ours, Collator(attention=attention)([made]))
        rows = log_probabilities(plain, Collator()(made))
    assert row.shape == rows.shape
    assert float((row - rows).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(("--attention", "dense", "--use_cpu"), marks=pytest.mark.slow),
        pytest.param(("--attention", "later"), marks=pytest.mark.gpu),
    ],
)
def test_hugging_face(tmp_path: Path, argv: tuple[str, ...]):
    pytest.importorskip("accelerate", reason="pip install 'sgl-apr[trainer]'")
    model = countdown_llama(tmp_path / "model", apr.dialect("spawn").tags, layers=2, hidden=64)
    tokenizer = HfTokenizer(model)
    texts = [
        asyncio.run(demonstration(problem, tokenizer, seed=0)).to_json()
        for problem in generate_problems(6, "train")
    ]
    data = tmp_path / "trajectories.jsonl"
    data.write_text("\n".join(texts) + "\n")
    out = tmp_path / "out"
    ran(
        EXAMPLES / "hf_trainer.py", "--model", model, "--data", data, "--output_dir", out, "--max_steps", 2,
        "--length", 2048, *argv, "--logging_steps", 1, "--report_to", "none",
        "--save_strategy", "steps", "--save_steps", 2, "--learning_rate", "1e-3",
    )  # fmt: skip
    logged = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert logged[1]["loss"] < logged[0]["loss"]
    eos = min(tokenizer.eos_ids)
    trees = [
        t
        for text in texts
        for t in build_training_tree([Trajectory.from_json(text)], eos=eos, separate_contexts=True).split()
    ]
    before, after = (
        log_probabilities(AutoModelForCausalLM.from_pretrained(path).eval(), Collator(pad=eos)(trees)).mean()
        for path in (model, out)
    )
    assert after > before


def test_the_reward_of_an_example():
    line, forked, wrong = (float(row.split()[0]) for row in ran(EXAMPLES / "verl_reward.py").splitlines())
    assert (line, wrong) == (1.0, 0.0)
    assert 1.0 < forked < 1.3
