"""Products of two or three rows with a weight on a CPU, made as products of four, which take less time.

Two or three branches of a fork are as many rows. Seen in float32 on an AMD EPYC: with them torch takes longer than
with four.
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
    """Around `UnquantizedLinearMethod.apply`."""
    return original(method, layer, pad_rows(x), *arguments, **options)[: len(x)]


def padded_lm_head(
    original: Callable[..., torch.Tensor],
    processor: Any,
    hidden: torch.Tensor,
    *arguments: Any,
    **options: Any,
) -> torch.Tensor:
    """Around `LogitsProcessor._compute_lm_head`; what is to be written into a buffer stays as it is."""
    x = hidden if options.get("out") is not None else pad_rows(hidden)
    return original(processor, x, *arguments, **options)[: len(hidden)]


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """(n, k) as it is, or (4, k) with rows of zeros behind two or three; only where it is in float32."""
    if x.dim() == 2 and 1 < len(x) < PADDED_ROWS and x.dtype == torch.float32:
        return torch.nn.functional.pad(x, (0, 0, 0, PADDED_ROWS - len(x)))
    return x
