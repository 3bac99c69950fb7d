"""Multiplies two or three rows with a weight as four rows, which takes less time on a CPU.

Two or three branches of a fork are that many rows. In float32 on an AMD EPYC, torch takes longer for them than for
four rows. The environment variable `SGLANG_APR_PADDED_MATMUL=0` switches this off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

PADDED_ROWS = 4


def padded_linear(
    original: Callable[..., torch.Tensor],
    method: Any,
    layer: torch.nn.Module,
    x: torch.Tensor,
    *arguments: Any,
    **options: Any,
) -> torch.Tensor:
    """Hook around `UnquantizedLinearMethod.apply`."""
    return original(method, layer, pad_rows(x), *arguments, **options)[: len(x)]


def padded_lm_head(
    original: Callable[..., torch.Tensor],
    processor: Any,
    hidden: torch.Tensor,
    *arguments: Any,
    **options: Any,
) -> torch.Tensor:
    """Hook around `LogitsProcessor._compute_lm_head`. It leaves calls alone that write into a buffer."""
    x = hidden if options.get("out") is not None else pad_rows(hidden)
    return original(processor, x, *arguments, **options)[: len(hidden)]


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """Append rows of zeros to two or three rows in float32, and return other tensors as they are.

    Args:
        x: [n, k].

    Returns:
        [4, k] if n is 2 or 3 and the type is float32, else `x`.
    """
    if x.dim() == 2 and 1 < len(x) < PADDED_ROWS and x.dtype == torch.float32:
        return torch.nn.functional.pad(x, (0, 0, 0, PADDED_ROWS - len(x)))
    return x
