"""Low-rank adapters: what they train, how they are merged, and runs that continue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.config import Data, Model, SftConfig, Steps
from sgl_apr.training.lora import (
    ADAPTER_FILE,
    TAG_ROWS,
    adapter_tensors,
    add_lora,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from sgl_apr.training.models import random_llama
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.sft import train

TAGS = apr.dialect("spawn").tags


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return countdown_llama(tmp_path_factory.mktemp("base"), TAGS, layers=2, hidden=32)


def load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path)


def test_an_adapter_begins_as_the_model_and_trains_nothing_else(checkpoint: Path):
    model, tokenizer = load(checkpoint), HfTokenizer(checkpoint)
    ids = torch.tensor([tokenizer.encode(" 39: 6 12 18 23" + TAGS[0] + TAGS[1])])
    before = model(ids).logits
    add_lora(model, 3, tokenizer.added_tokens.values())
    torch.testing.assert_close(model(ids).logits, before)
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    rows = [shape for name, shape in trained.items() if not name.endswith((".down", ".up"))]
    assert rows == [(len(TAGS), 32)]
    assert (
        len(trained) == 2 * 7 * 2 + 1
    )  # two factors of the seven layers of each of two blocks, and the tags


def test_a_merged_adapter_computes_the_same(checkpoint: Path, tmp_path: Path):
    torch.manual_seed(0)
    model, tokenizer = load(checkpoint), HfTokenizer(checkpoint)
    add_lora(model, 3, tokenizer.added_tokens.values())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape)).copy_(p.to(torch.bfloat16))
    ids = torch.tensor([tokenizer.encode(" 39: 6 12 18 23" + TAGS[0] + TAGS[1])])
    expected, plain = model(ids).logits, load(checkpoint)
    assert (expected - plain(ids).logits).abs().max() > 0.1
    save_adapter(tmp_path / ADAPTER_FILE, adapter_tensors(model))
    merge_adapter(plain, load_adapter(tmp_path / ADAPTER_FILE))
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_unusable_adapters_and_models(checkpoint: Path, tmp_path: Path):
    added = HfTokenizer(checkpoint).added_tokens.values()
    with pytest.raises(apr.AprError, match="lora_rank = -1"):
        add_lora(load(checkpoint), -1, added)
    with pytest.raises(apr.AprError, match="no tag is at the end"):
        add_lora(load(checkpoint), 2, [0])
    with pytest.raises(apr.AprError, match="not tied"):
        add_lora(load(random_llama(tmp_path / "random", tags=TAGS)), 2, added)
    model = load(checkpoint)
    add_lora(model, 2, added)
    tensors = adapter_tensors(model)
    first = next(iter(tensors))
    for wrong, message in [
        ({first: tensors[first]}, "the adapter has no model.layers.0"),
        (tensors | {"more": tensors[first]}, "has more, which the model does not"),
        ({n: t for n, t in tensors.items() if n != TAG_ROWS}, "no tag_rows"),
        (tensors | {first: tensors[first][:, :-1]}, r"expected \(32, 32\)"),
    ]:
        with pytest.raises(apr.AprError, match=message):
            merge_adapter(load(checkpoint), wrong)
    (tmp_path / "damaged").write_bytes(b"{}")
    with pytest.raises(apr.AprError, match="cannot be read as an adapter"):
        load_adapter(tmp_path / "damaged")


@pytest.mark.slow
def test_a_killed_run_of_an_adapter_continues_with_the_same_losses(checkpoint: Path, tmp_path: Path):
    steps = Steps(tokens=24_000, batch=2048, warmup=2, checkpoint=3, rate=0.02, optimizer="adam", lora_rank=4)
    config = SftConfig(Model(path=str(checkpoint)), Data(problems=40, window=128), steps)
    model = train(config, tmp_path / "complete")
    log = [json.loads(line) for line in (tmp_path / "complete/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - 0.05
    merged, start = load(model), load(checkpoint)
    merge_adapter(start, load_adapter(tmp_path / "complete" / ADAPTER_FILE))
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, start.state_dict()[name])

    class Killed(Exception):
        pass

    def kill(step) -> None:
        if step.step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "killed", kill)
    train(config, tmp_path / "killed")
    again = [json.loads(line) for line in (tmp_path / "killed/log.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in again] == pytest.approx([x["loss"] for x in log])


@pytest.mark.slow
def test_adam_differs_from_muon(checkpoint: Path, tmp_path: Path):
    losses = {}
    for optimizer in ("muon", "adam"):
        steps = Steps(tokens=6_000, batch=2048, warmup=1, rate=5e-3, optimizer=optimizer)
        config = SftConfig(Model(path=str(checkpoint)), Data(problems=40, window=128), steps)
        train(config, tmp_path / optimizer)
        lines = (tmp_path / optimizer / "log.jsonl").read_text().splitlines()
        losses[optimizer] = [json.loads(line)["loss"] for line in lines]
    assert losses["muon"][0] == losses["adam"][0]
    assert losses["muon"][-1] != losses["adam"][-1]
