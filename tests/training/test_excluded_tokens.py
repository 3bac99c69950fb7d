"""Losses under what a grammar allows: excluded tokens have no probability, and examples exclude what their format has not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.formats.presets import known_dialects
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training import Collator
from sgl_apr.training.collate import log_probabilities, to_device
from sgl_apr.training.config import Data, Model, SftConfig, Steps
from sgl_apr.training.examples import CountdownExamples
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.sft import train

NAMES = ("multiverse", "spawn", "npr", "parathinker")
DATA = Data(
    dialects=NAMES, sequential=0.3, problems=30, numbers=(3, 4), unsolvable=0.2, window=1024, state_width=0.5
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make few demonstrations at a time, since a chunk takes seconds."""
    monkeypatch.setattr("sgl_apr.training.examples.CHUNK_SIZE", 64)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tags = dict.fromkeys(tag for name in NAMES for tag in apr.dialect(name).tags)
    return countdown_llama(
        tmp_path_factory.mktemp("three"), list(tags), layers=1, hidden=32, dialects=NAMES, context=4096
    )


def ids(tokenizer: HfTokenizer, name: str) -> set[int]:
    return {i for tag in apr.dialect(name).tags if (i := tokenizer.special_token_id(tag)) is not None}


def test_examples_exclude_the_tags_of_other_formats(path: Path):
    tokenizer = HfTokenizer(path)
    trees = CountdownExamples(DATA, tokenizer).chunk(0)
    every = set().union(*(ids(tokenizer, name) for name in NAMES))
    expected = {name: tuple(sorted(every - ids(tokenizer, name))) for name in NAMES}
    found = {tree.excluded for tree in trees}
    assert found == {*expected.values(), tuple(sorted(every))}
    assert all(not set(tree.targets.tolist()) & set(tree.excluded) for tree in trees)
    prompts = [tokenizer.decode(tree.tree.token_ids[:12]) for tree in trees]
    assert 0.1 < sum("; " in text.partition("<")[0] for text in prompts) / len(prompts) < 0.7
    alone = CountdownExamples(replace(DATA, dialects=("spawn",), sequential=1.0), tokenizer).chunk(0)
    assert {tree.excluded for tree in alone} == {()}, "a model that never forks chooses so"


def test_excluded_tokens_have_no_probability(path: Path):
    tokenizer = HfTokenizer(path)
    trees = CountdownExamples(DATA, tokenizer).chunk(0)[:12]
    assert len({tree.excluded for tree in trees}) > 2
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        together = log_probabilities(model, to_device(Collator()(trees), "cpu"))
        at = 0
        for tree in trees:
            plain = Collator()([replace(tree, excluded=())])
            logits = model(
                input_ids=plain["input_ids"],
                position_ids=plain["position_ids"],
                attention_mask=plain["attention_mask"],
            ).logits[0, plain["sources"]]
            logits[:, list(tree.excluded)] = -np.inf
            expected = logits.log_softmax(-1).gather(-1, plain["targets"][:, None])[:, 0]
            assert torch.allclose(together[at : at + len(expected)], expected, atol=1e-4)
            assert (expected > log_probabilities(model, plain)).all()
            at += len(expected)


def test_a_target_that_is_excluded_is_an_error(path: Path):
    tree = CountdownExamples(DATA, HfTokenizer(path)).chunk(0)[0]
    with pytest.raises(apr.AprError, match="excludes a token that was decoded"):
        Collator()([replace(tree, excluded=(int(tree.targets[0]),))])


def test_a_model_of_several_formats_declares_them(path: Path, tmp_path: Path):
    assert known_dialects(HfTokenizer(path)) == [apr.dialect(name) for name in NAMES]
    assert apr.dialect_for(HfTokenizer(path)) is apr.dialect("multiverse")
    config = SftConfig(
        Model(layers=1, hidden=32, context=4096),
        DATA,
        Steps(tokens=6000, batch=2048, warmup=1, tag_weight=3.0, precision="bfloat16"),
    )
    model = train(config, tmp_path / "run")
    assert known_dialects(HfTokenizer(model))[0] is apr.dialect("multiverse")
    assert known_dialects(apr.ByteTokenizer(apr.dialect("npr").tags)) == [apr.dialect("npr")]
