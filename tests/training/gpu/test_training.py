"""Training on a GPU: FlexAttention against dense masks in double precision, and runs that use it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.errors import AprError
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.problems import generate_problems
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.attention_mask import Visibility
from sgl_apr.training.collate import Collator, log_probabilities, to_device
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.sft import train
from sgl_apr.training.training_tree import TrainingTree, build_training_tree
from sgl_apr.training.trie import FlatTree
from tests.training.test_sft import SMALL, losses
from tests.training.test_trie import grown

LENGTH = 700  # a block, in part full, and a last one that is cut


def trees(joins: bool) -> list[FlatTree]:
    """Two padded rows of a hundred tokens or more."""
    rng = random.Random(1)
    rows = []
    for _ in range(2):
        row, *others = (grown(rng, joins)[0].flatten()[0] for _ in range(8))
        at = len(row.ends)
        placed = []
        for tree in others:
            placed.append(tree.shifted(at))
            at += len(tree.ends)
        rows.append(row.concatenate(placed))
    return rows


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "joins", "allowed"),
    [(torch.float32, False, 1e-5), (torch.float32, True, 1e-5), (torch.bfloat16, True, 2e-2)],
)
def test_flex_attention_equals_attention_with_the_dense_mask(dtype: torch.dtype, joins: bool, allowed: float):
    """Compares outputs and gradients by their norm; two query heads share each key and value head."""
    torch.manual_seed(0)
    sight = Visibility.from_trees(trees(joins), LENGTH).to("cuda")
    assert bool(sight.joined.shape[1]) == joins
    heads = [torch.randn(2, n, LENGTH, 64, device="cuda", dtype=dtype, requires_grad=True) for n in (4, 2, 2)]
    onto = torch.randn(2, 4, LENGTH, 64, device="cuda", dtype=dtype)
    compiled = torch.compile(flex_attention)
    found = compiled(*heads, block_mask=sight.block_mask(), enable_gqa=True)
    doubled = [h.detach().double().requires_grad_() for h in heads]
    expected = scaled_dot_product_attention(*doubled, attn_mask=sight.dense_mask(), enable_gqa=True)
    mine = [found, *torch.autograd.grad(found, heads, onto)]
    theirs = [expected, *torch.autograd.grad(expected, doubled, onto.double())]
    for one, other in zip(mine, theirs, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < allowed


def searches(model: Path) -> list[TrainingTree]:
    problem = next(generate_problems(1, "train", numbers=(4,)))
    trajectory = asyncio.run(demonstration(problem, HfTokenizer(model), seed=0))
    return build_training_tree([trajectory], separate_contexts=True).split()


@pytest.mark.gpu
def test_flex_attention_has_the_gradient_of_the_dense_mask(tmp_path: Path):
    path = countdown_llama(tmp_path, apr.dialect("spawn").tags, layers=2, hidden=64)
    made = searches(path)
    gradients, outputs = [], []
    for attention, kind in (("dense", "sdpa"), ("later", "flex_attention")):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=kind)
        batch = to_device(Collator(attention=attention)([made]), "cuda")
        found = log_probabilities(model.to("cuda"), batch)
        found.sum().backward()
        outputs.append(found.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-4)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-4


@pytest.mark.gpu
def test_a_run_has_the_losses_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first losses are equal; later ones drift by rounding."""
    config = replace(SMALL, steps=replace(SMALL.steps, tokens=6000))
    torch.cuda.reset_peak_memory_stats()
    train(config, tmp_path / "gpu")
    assert torch.cuda.max_memory_allocated() > 1 << 20
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    train(config, tmp_path / "cpu")
    mine, theirs = losses(tmp_path / "gpu"), losses(tmp_path / "cpu")
    assert len(mine) > 1
    assert dict(mine) == pytest.approx(dict(theirs), rel=1e-3)


def test_a_block_mask_cannot_be_moved(tmp_path: Path):
    made = searches(countdown_llama(tmp_path, apr.dialect("spawn").tags, layers=1, hidden=32))
    with pytest.raises(AprError, match="later"):
        to_device(Collator(attention="flex")([made]), "cpu")
