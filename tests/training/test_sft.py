"""Supervised fine-tuning: gradients against separate sequences, resuming, and errors."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.cli.main import main
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.problems import generate_problems
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.collate import Collator, log_probabilities, pack_rows, to_device
from sgl_apr.training.config import Data, Model, SftConfig, Steps, load_config
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.sft import START_DIR, SftStepLog, train
from sgl_apr.training.training_tree import build_training_tree
from tests.support.masked_sampler import SampledEngine, masked

SMALL = SftConfig(
    Model(layers=1, hidden=32),
    Data(problems=40, window=128),
    Steps(tokens=24_000, batch=2048, warmup=2, checkpoint=3),
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make few demonstrations at a time, since a chunk takes seconds."""
    monkeypatch.setattr("sgl_apr.training.examples.CHUNK_SIZE", 32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = countdown_llama(tmp_path_factory.mktemp("tiny"), apr.dialect("spawn").tags, layers=2, hidden=32)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="sdpa")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["threadweaver", "npr", "pasta", "spawn"])
def test_the_gradient_equals_that_of_separate_sequences(tiny, name: str, device: str):
    """The reference runs each request separately with a causal mask, in double precision."""
    engine = SampledEngine(masked(name), seed=4)
    sent: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    decode = engine.decode

    async def noted(request, on_tokens=None):
        result = await decode(request, on_tokens)
        sent.append((request.input_ids, result.token_ids))
        return result

    engine.decode = noted
    budget = apr.Budget(tokens=300, width=3)
    made = [asyncio.run(apr.areason(engine, "Q: ", name, budget=budget, mode="parallel")) for _ in range(2)]
    structures = [build_training_tree([t], eos=256) for t in made]
    (row,) = pack_rows(structures, 10_000)
    tiny.to(device).zero_grad()
    (-log_probabilities(tiny, to_device(Collator()([row]), device)).sum()).backward()
    packed_gradient = [p.grad.clone() for p in tiny.parameters()]

    tiny.zero_grad()
    for prompt, decoded in sent:
        ids = torch.tensor([[*prompt, *decoded]], device=device)
        logits = tiny(ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float()
        (-logits.log_softmax(-1)[torch.arange(len(decoded)), list(decoded)].sum()).backward()
    for mine, theirs in zip(packed_gradient, (p.grad for p in tiny.parameters()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert sum(len(s.sources) for s in structures) == sum(len(decoded) for _, decoded in sent)


def losses(out: Path) -> list[tuple[int, float]]:
    return [
        (line["step"], line["loss"]) for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
    ]


class Killed(Exception):
    pass


def test_a_killed_run_continues_with_the_same_losses(tmp_path: Path):
    train(SMALL, tmp_path / "whole")
    expected = losses(tmp_path / "whole")
    assert len(expected) > 8
    assert expected[-1][1] < expected[0][1]

    for at in (2, 7):  # before the first checkpoint, and between two

        def kill(step: SftStepLog, at: int = at) -> None:
            if step.step == at:
                raise Killed

        with pytest.raises(Killed):
            train(SMALL, tmp_path / "killed", kill)
    model = train(SMALL, tmp_path / "killed")
    assert dict(losses(tmp_path / "killed")) == pytest.approx(dict(expected))
    again = AutoModelForCausalLM.from_pretrained(model).state_dict()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model").state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert HfTokenizer(model).encode(" 12") == HfTokenizer(tmp_path / "whole" / "model").encode(" 12")


def test_the_directory_of_another_run_is_an_error(tmp_path: Path):
    train(replace(SMALL, steps=replace(SMALL.steps, tokens=2000)), tmp_path)
    with pytest.raises(apr.AprError, match="another configuration"):
        train(SMALL, tmp_path)


@pytest.mark.parametrize("init", [0.02, 0.2])
def test_fresh_weights_have_the_deviation_that_was_asked_for(tmp_path: Path, init: float):
    model = Model(layers=1, hidden=32, init=init)
    train(replace(SMALL, model=model, steps=replace(SMALL.steps, tokens=1)), tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / START_DIR)
    assert fresh.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(init, rel=0.1)


@pytest.mark.parametrize("init", [0.0, -1.0, float("nan")])
def test_weights_that_are_all_the_same_are_an_error(tmp_path: Path, init: float):
    with pytest.raises(apr.AprError, match=r"init = .*, expected more than 0"):
        train(replace(SMALL, model=replace(SMALL.model, init=init)), tmp_path)


def test_trajectories_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    model = countdown_llama(tmp_path / "model", apr.dialect("spawn").tags, layers=1, hidden=32)
    tokenizer = HfTokenizer(model)
    made = [asyncio.run(demonstration(p, tokenizer, seed=0)) for p in generate_problems(6, "train")]
    lines = tmp_path / "made.jsonl"
    lines.write_text("".join(t.to_json() + "\n" for t in made))
    config = tmp_path / "sft.toml"
    config.write_text(
        f'[model]\npath = "{model}"\n[data]\npath = "{lines}"\n[steps]\ntokens = 5000\nbatch = 2048\nwarmup = 1\n'
    )
    assert main(["train", "sft", str(config), "-o", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Path(found["model"], "model.safetensors").exists()
    assert found["step"] == len(losses(tmp_path / "out"))
    assert (tmp_path / "out" / "log.png").read_bytes().startswith(b"\x89PNG")

    other = apr.ByteTokenizer(apr.dialect("threadweaver").tags)
    lines.write_text(apr.dialect("threadweaver").parse("six times seven is 42", other).to_json() + "\n")
    assert main(["train", "sft", str(config), "-o", str(tmp_path / "other")]) == 1
    assert "another tokenizer" in capsys.readouterr().err
    lines.write_text("\n")
    assert main(["train", "sft", str(config), "-o", str(tmp_path / "empty")]) == 1
    assert "is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[steps]\ntokens = 'many'", "steps.tokens = 'many', expected int"),
        ("[step]\ntokens = 5", "step is not known, expected one of model, data, steps"),
        ("[data]\njoin = 'tree'", "data.join = 'tree', expected one of 'kv', 'text', ''"),
        ("[data]\nwidth = 3", "data.width = 3, expected a list"),
        ("data = 3", "data: expected a table of path"),
        ("[data", "is not a TOML file"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_configuration_is_an_error_with_what_was_expected(
    tmp_path: Path, text: str | None, message: str
):
    path = tmp_path / "sft.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(apr.AprError, match=message.replace("[", r"\[")):
        load_config(SftConfig, path)


def test_entries_can_be_replaced(tmp_path: Path):
    path = tmp_path / "sft.toml"
    path.write_text("[steps]\nseed = 3\ntokens = 7\n")
    changes = ["steps.seed=1", 'data.dialects=["npr", "spawn"]', "data.forks={ 4 = 0.5 }"]
    found = load_config(SftConfig, path, changes)
    assert (found.steps.seed, found.steps.tokens) == (1, 7)
    assert (found.data.dialects, found.data.forks) == (("npr", "spawn"), {"4": 0.5})
    for wrong, message in (("steps.seed", "no entry in TOML such as"), ("steps.sead=1", "sead is not known")):
        with pytest.raises(apr.AprError, match=message):
            load_config(SftConfig, path, [wrong])


def test_fifty_steps_of_the_recipe(tmp_path: Path):
    """The loss falls with the repository's configuration, cut to fifty steps of a small model."""
    recipe = load_config(SftConfig, Path("configs/countdown-parallel.toml"))
    config = replace(
        recipe,
        model=replace(recipe.model, path="", layers=2, hidden=64),
        data=replace(recipe.data, problems=300),
        steps=replace(recipe.steps, tokens=50 * 1024, batch=1024, warmup=10, rate=3e-3),
    )
    train(config, tmp_path)
    found = losses(tmp_path)
    assert len(found) >= 50
    assert sum(x for _, x in found[-10:]) / 10 < 0.7 * found[0][1]
