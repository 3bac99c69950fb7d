"""The C kernel applies llguidance's token masks as llguidance does."""

from __future__ import annotations

import math

import pytest
import torch

from sgl_apr.errors import LaunchError
from sgl_apr.server.cpu import mask_kernel
from sgl_apr.server.cpu.mask_kernel import apply_vocab_mask, register_hooks


def refuse(*_: object) -> None:
    raise AssertionError("the kernel was not used")


def expected(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What llguidance computes, written for single bits."""
    words, vocab = mask.shape[1], logits.shape[1]
    tokens = torch.arange(min(vocab, 32 * words))
    bits = torch.zeros(logits.shape, dtype=torch.bool)
    bits[:, : len(tokens)] = (mask.long()[:, tokens // 32] >> (tokens % 32)) & 1 == 1
    return torch.where(bits, logits, -math.inf)


@pytest.mark.parametrize(
    ("rows", "vocab", "words"),
    [(1, 658, 21), (3, 64, 2), (5, 31, 1), (2, 33, 2), (4, 100, 2), (2, 40, 9), (3, 5000, 157)],
)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_forbidden_tokens_are_minus_infinity(rows: int, vocab: int, words: int, density: float):
    generator = torch.Generator().manual_seed(vocab)
    mask = torch.randint(-(2**31), 2**31, (rows, words), generator=generator).int()
    fixed = torch.rand(rows, words, generator=generator) > 0.5
    mask = torch.where(fixed, -1 if density == 1.0 else 0, mask).int() if density != 0.5 else mask
    logits = torch.randn(rows, vocab, generator=generator)
    logits[0, 0] = math.nan if density == 1.0 else 0.0
    want = expected(logits, mask)
    apply_vocab_mask(refuse, logits=logits, vocab_mask=mask)
    assert torch.equal(logits.nan_to_num(7), want.nan_to_num(7))


def test_rows_of_larger_tensors_are_masked_and_nothing_else():
    buffer, masks = torch.ones(8, 80), torch.zeros(8, 4, dtype=torch.int32)
    apply_vocab_mask(refuse, buffer[::2, :64], masks[::2, :2])
    assert buffer[::2, :64].isinf().all()
    assert buffer[1::2].eq(1).all()
    assert buffer[:, 64:].eq(1).all()


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(64), torch.zeros(3, 64), torch.zeros(64, 2).T],
)
def test_sglang_applies_what_the_kernel_cannot_read(logits: torch.Tensor):
    mask = torch.zeros(2, 2, dtype=torch.int32)
    assert apply_vocab_mask(lambda *tensors: tensors, logits, mask) == (logits, mask)


def test_sglang_applies_masks_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(mask_kernel, "SOURCE", mask_kernel.SOURCE.with_name("platform.py"))  # no C
    monkeypatch.setattr(mask_kernel, "mask_kernel", mask_kernel.mask_kernel.__wrapped__)
    logits, mask = torch.zeros(1, 64), torch.zeros(1, 2, dtype=torch.int32)
    assert apply_vocab_mask(lambda *tensors: tensors, logits, mask) == (logits, mask)
    assert "torch compiles the kernel for token masks" in caplog.text


def test_another_sglang_keeps_its_own_kernel(monkeypatch: pytest.MonkeyPatch, caplog):
    def missing(path: str, *_: object) -> None:
        raise LaunchError(f"this SGLang has no {path}")

    monkeypatch.setattr(mask_kernel, "hook_around", missing)
    register_hooks()
    assert "this SGLang has no sglang.srt.constrained.llguidance_backend:GuidanceGrammar" in caplog.text
