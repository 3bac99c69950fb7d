"""The Muon optimizer against PyTorch's own, which computes in bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch

from sgl_apr.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (1, 24, 8)])
def test_orthogonalize(shape: tuple[int, int, int]):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    found = torch.linalg.svdvals(orthogonalize(matrices))
    assert found.min() > 0.4
    assert found.max() < 1.3


def test_muon_matches_pytorch():
    """Ten steps on a matrix and a vector: the same distance from the start, and nearly the same values."""
    torch.manual_seed(0)
    ours = torch.nn.Linear(32, 16)
    theirs, begun = copy.deepcopy(ours), copy.deepcopy(ours)
    groups = [
        {"params": [ours.weight], "weight_decay": 0.1, "matrices": True},
        {"params": [ours.bias], "weight_decay": 0.1},
    ]
    optimizers = [
        Muon(groups, lr=0.01),
        torch.optim.Muon([theirs.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([theirs.bias], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)),
    ]
    x, y = torch.randn(64, 32), torch.randn(64, 16)
    for _ in range(10):
        for model in (ours, theirs):
            (model(x) - y).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    moved = (theirs.weight - begun.weight).norm()
    assert (ours.weight - theirs.weight).norm() < 0.05 * moved
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=0, atol=1e-3)


def test_parameters_without_a_gradient_stay():
    still = torch.nn.Parameter(torch.ones(2, 2))
    Muon([{"params": [still], "weight_decay": 0.5, "matrices": True}], lr=0.1).step()
    assert torch.equal(still, torch.ones(2, 2))
