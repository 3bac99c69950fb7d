"""The benchmark of a language model that decides to fork: its figures, and a tiny model from data to figures on a real server."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import sgl_apr as apr
from benchmarks.quality import language_model
from benchmarks.quality.language_model import (
    Reply,
    accuracy_figures,
    closing_figures,
    contains_answer,
    decision_figures,
    judge,
    missed,
    perplexity_figures,
)
from sgl_apr.cli.main import main
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.demonstrations import __main__ as command
from sgl_apr.training.demonstrations.fork_reply import Demonstration, fork_reply
from sgl_apr.training.models import random_llama
from sgl_apr.training.models.countdown import countdown_llama

TWO = Demonstration(
    "questions", "questions/test/0", ("sum", "capital"), "What is 2 + 2? What is the capital of Peru?",
    fork_reply([("2 + 2", "2 + 2 = 4."), ("Peru", "The capital of Peru is Lima.")], "1. 4\n2. Lima"), ("4", "Lima"), True,
)  # fmt: skip
ONE = Demonstration("question", "question/test/0", ("sum",), "What is 2 + 2?", "2 + 2 = 4.", ("4",), False)


def reply(question: Demonstration, text: str) -> Reply:
    trajectory = apr.read(
        text, "threadweaver", tokenizer=apr.ByteTokenizer(apr.dialect("threadweaver").tags)
    ).trajectory
    return Reply(question, trajectory, judge(question, trajectory))


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("It is Lima.", "lima", True),
        ("112", "12", False),
        ("12.", "12", True),
        ("3.12", "12", False),
        ("a-b", "b", True),
    ],
)
def test_answers_are_words_of_their_own(text: str, answer: str, expected: bool):
    assert contains_answer(text, answer) == expected


def test_each_branch_has_to_answer_its_part():
    assert reply(TWO, TWO.reply).right == (True, True)
    swapped = fork_reply([("a", "It is Lima."), ("b", "It is 4.")], "4, Lima")
    assert reply(TWO, swapped).right == (False, False)
    one_branch = fork_reply([("a", "2 + 2 = 4.")], "4, Lima")
    assert reply(TWO, one_branch).right == (True, False)
    assert reply(TWO, "4, and Lima").right == (True, True)  # without a fork, anywhere in the reply
    assert reply(ONE, "5").right == (False,)
    assert reply(replace(ONE, answers=()), "5").right == ()


def test_figures_count_decisions_closed_branches_and_right_parts():
    replies = [reply(TWO, TWO.reply)] * 3 + [reply(TWO, "4 and Lima")] + [reply(ONE, ONE.reply)] * 4
    decision = decision_figures(replies)
    assert decision["balanced_accuracy"] == pytest.approx((0.75 + 1) / 2)
    low, high = decision["ci95"]
    assert low < decision["balanced_accuracy"] < high <= 1
    assert decision["by_kind"]["questions"] == {"count": 4, "several_parts": True, "forks": 0.75}
    closing = closing_figures(replies)
    assert (closing["branches"], closing["closed_by_model"], closing["as_many_branches_as_parts"]) == (
        6,
        1.0,
        1.0,
    )
    accuracy = accuracy_figures([*replies, reply(ONE, "5")])
    assert accuracy["several_parts"]["accuracy"] == 1
    assert accuracy["one_part"]["accuracy"] == pytest.approx(0.8)


def test_a_branch_that_the_runtime_closed_is_not_the_models():
    made = reply(TWO, TWO.reply)
    spans = tuple(
        replace(s, origin="injected") if s.role == "closer" and s.path == (1, 2) else s
        for s in made.trajectory.spans
    )
    cut = replace(made, trajectory=replace(made.trajectory, spans=spans))
    assert closing_figures([cut])["closed_by_model"] == 0.5


def test_perplexity_is_compared_over_all_tokens():
    figures = perplexity_figures([(-10.0, 10), (-20.0, 10)], [(-11.0, 10), (-22.0, 10)])
    assert figures["base"] == pytest.approx(2.71828**1.5, rel=1e-4)
    assert figures["ratio"] == pytest.approx(2.71828**0.15, rel=1e-4)
    assert figures["ci95"][0] < figures["ratio"] < figures["ci95"][1]


def test_missed_bars_are_named():
    result = {
        "decision": {"balanced_accuracy": 0.849},
        "closing": {"closed_by_model": 0.9},
        "perplexity": {"ratio": 1.06},
    }
    assert len(missed(result)) == 2
    assert "84.9%, expected at least 85%" in missed(result)[0]
    result = {
        "decision": {"balanced_accuracy": 0.85},
        "closing": {"closed_by_model": 0.9},
        "perplexity": {"ratio": 1.05},
    }
    assert missed(result) == []
    assert missed({"model": "m"}) == []  # of the parts that were measured


def train_tiny(base: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> list[float]:
    """Write demonstrations by the command and train by the configuration of the recipe; returns the losses."""
    data = directory / "train.jsonl"
    argv = ["demonstrations", "write", str(data), "--count", "60", "--model", str(base)]
    monkeypatch.setattr(sys, "argv", argv)
    assert command.main() == 0
    assert len(data.read_text().splitlines()) == 60
    small = [
        f'model.path="{base}"',
        f'data.path="{data}"',
        "steps.tokens=60000",
        "steps.row=2048",
        "steps.rate=5e-3",
    ]
    options = [part for change in (*small, *changes) for part in ("--set", change)]
    assert (
        main(["train", "sft", "configs/smollm2-threadweaver.toml", *options, "-o", str(directory / "run")])
        == 0
    )
    return [json.loads(line)["loss"] for line in (directory / "run/log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.server
def test_a_tiny_model_from_data_to_figures(
    forked_server: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Data by the command, training by the configuration of the recipe, and the figures on a real server."""
    base = random_llama(tmp_path / "base", tags=apr.dialect("threadweaver").tags, layers=2, hidden=64)
    losses = train_tiny(base, tmp_path, monkeypatch)
    assert len(losses) >= 20
    assert losses[-1] < 0.9 * losses[0]
    capsys.readouterr()

    monkeypatch.setattr(apr, "Server", forked_server)
    argv = [
        "language_model",
        str(tmp_path / "run/model"),
        "--base",
        str(base),
        "--questions",
        "12",
        "--plain",
        "4",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "--json"])
    assert language_model.main() == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["questions"] == 12
    assert 0 <= figures["decision"]["balanced_accuracy"] <= 1
    assert figures["perplexity"]["trained"] < figures["perplexity"]["base"]


@pytest.mark.slow
def test_a_tiny_adapter_from_data_to_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    tags = ["<|im_start|>", "<|im_end|>", *apr.dialect("threadweaver").tags]
    base = countdown_llama(tmp_path / "base", tags, layers=2, hidden=64)
    losses = train_tiny(base, tmp_path, monkeypatch, "steps.lora_rank=4")
    assert losses[-1] < 0.97 * losses[0]  # an adapter of random weights learns little
    capsys.readouterr()
    assert main(["model", "smollm2", "--trained", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run/model'}\n"
    sizes = [
        (tmp_path / "run" / name).stat().st_size
        for name in ("adapter.safetensors", "model/model.safetensors")
    ]
    assert sizes[0] < sizes[1] / 10
