"""Products of two or three rows equal those of four rows, cut, and SGLang computes them that way."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear

from sgl_apr.server.cpu import padded_matmul

# In another process, because hooks cannot be removed.
HOOKED = """
import os, torch
from types import SimpleNamespace
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.quantization import unquant
from sglang.srt.layers.logits_processor import LogitsProcessor
row_counts, stock, matmul = [], unquant.F.linear, torch.matmul
unquant.F.linear = lambda x, *more: (row_counts.append(len(x)), stock(x, *more))[1]
torch.matmul = lambda x, *more: (row_counts.append(len(x)), matmul(x, *more))[1]
layer = SimpleNamespace(weight=torch.ones(2, 5), use_intel_amx_backend=False)
processor = SimpleNamespace(use_fp32_lm_head=False, use_fp32_lm_head_output=False, rl_on_policy_target=None)
for n in (1, 2, 3, 5):
    assert unquant.UnquantizedLinearMethod().apply(layer, torch.ones(n, 5)).tolist() == [[5, 5]] * n
    assert LogitsProcessor._compute_lm_head(processor, torch.ones(n, 5), layer).tolist() == [[5, 5]] * n
print(row_counts)
"""


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5])
def test_the_product_is_the_same(rows: int):
    x, layer = torch.randn(rows, 8), SimpleNamespace(weight=torch.randn(6, 8))

    def original(_, layer, x, bias):
        assert len(x) == (4 if rows in (2, 3) else rows)
        return linear(x, layer.weight, bias)

    bias = torch.randn(6)
    product = padded_matmul.padded_linear(original, None, layer, x, bias)
    torch.testing.assert_close(product, linear(x, layer.weight, bias))


@pytest.mark.parametrize("x", [torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 1, 3), torch.ones(3)])
def test_other_tensors_are_returned_as_they_are(x: torch.Tensor):
    assert padded_matmul.pad_rows(x) is x


def test_a_buffer_is_written_into():
    x, out = torch.ones(3, 2), torch.empty(3, 2)

    def original(_, hidden, head, *, out):
        return out.copy_(hidden)

    assert padded_matmul.padded_lm_head(original, None, x, None, out=out).data_ptr() == out.data_ptr()
    assert out.tolist() == x.tolist()


@pytest.mark.slow  # the process takes long to import SGLang's layers
def test_sglang_multiplies_padded_rows():
    ran = subprocess.run([sys.executable, "-c", HOOKED], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[1, 1, 4, 4, 4, 4, 5, 5]"
