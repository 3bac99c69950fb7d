"""Attention to visible blocks alone is the attention of the dense mask, forward and backward."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.problems import generate_problems
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training import build_training_tree
from sgl_apr.training.attention_mask import Visibility
from sgl_apr.training.block_attention import BLOCK_ATTENTION, VisibleBlocks
from sgl_apr.training.collate import Collator, log_probabilities
from sgl_apr.training.device import collator_for, load_model
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.training_tree import TrainingTree


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return countdown_llama(
        tmp_path_factory.mktemp("model"), apr.dialect("multiverse").tags, layers=2, hidden=64
    )


@pytest.fixture(scope="module")
def trees(path: Path) -> list[TrainingTree]:
    """Trees with KV joins, of 60 to 1,500 tokens."""
    tokenizer = HfTokenizer(path)
    return [
        build_training_tree(
            [asyncio.run(demonstration(problem, tokenizer, seed=0, target_dialect="multiverse"))], join="kv"
        )
        for size in (2, 3, 4)
        for problem in generate_problems(3, "train", numbers=(size,))
    ]


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 9), slice(8, 9)], ids=["short", "long", "one"])
def test_values_and_gradients_are_those_of_the_dense_mask(path: Path, trees: list[TrainingTree], rows: slice):
    results = []
    for attention, layout in (("sdpa", "dense"), (BLOCK_ATTENTION, "later")):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
        values = log_probabilities(model, Collator(attention=layout)(trees[rows]))
        (values * torch.linspace(0.5, 1.5, len(values))).mean().backward()
        results.append((values.detach(), [p.grad for p in model.parameters()]))
    (dense, dense_gradients), (sparse, sparse_gradients) = results
    assert float((dense - sparse).abs().max()) < 1e-4
    for expected, gradient in zip(dense_gradients, sparse_gradients, strict=True):
        assert torch.allclose(expected, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("size", [16, 64, 128])
def test_every_visible_pair_is_in_one_block(trees: list[TrainingTree], size: int):
    batch = Collator(attention="later")(trees[3:])
    visibility = Visibility(batch["ends"], batch["joined"]).pad_to_multiple(size)
    blocks = VisibleBlocks.from_visibility(visibility, size)
    visible = visibility.dense_mask().squeeze(1)
    rows, length = visibility.ends.shape
    number = length // size
    found = torch.zeros_like(visible, dtype=torch.int64)
    for group in blocks.groups:
        for query, keys, mask in zip(group.queries.tolist(), group.keys.tolist(), group.mask, strict=True):
            row, place = divmod(query, number)
            for k, key in enumerate(keys):
                seen = mask[0, :, k * size : (k + 1) * size] == 0
                assert not seen.any() or key // number == row
                at = key % number * size
                found[row, place * size : (place + 1) * size, at : at + size] += seen
    assert torch.equal(found, visible.long())
    visited = sum(group.mask.numel() for group in blocks.groups)
    assert visited < 0.8 * rows * length**2


def test_a_model_for_the_cpu_has_it_and_a_checkpoint_does_not(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = load_model(path)
    assert model.config._attn_implementation == BLOCK_ATTENTION
    assert collator_for(model, 0).attention == "later"
    model.save_pretrained(tmp_path)
    assert BLOCK_ATTENTION not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert collator_for(plain, 0).attention == "dense"


def test_a_dense_mask_is_refused(path: Path, trees: list[TrainingTree]):
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=BLOCK_ATTENTION)
    with pytest.raises(
        apr.AprError, match=r'takes no mask, expected batches of Collator\(attention="later"\)'
    ):
        log_probabilities(model, Collator()(trees[:1]))
