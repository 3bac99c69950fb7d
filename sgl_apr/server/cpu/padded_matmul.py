"""Products of two or three rows with a weight on a CPU, made as products of four, which take less time.

Two or three branches of a fork are as many rows. Seen in float32 on an AMD EPYC: with them torch takes longer than
with four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

ROWS = 4


def apply(
    original: Callable[..., torch.Tensor],
    method: Any,
    layer: torch.nn.Module,
    x: torch.Tensor,
    *arguments: Any,
    **options: Any,
) -> torch.Tensor:
    """Around `UnquantizedLinearMethod.apply`."""
    return original(method, layer, padded(x), *arguments, **options)[: len(x)]


def logits(
    original: Callable[..., torch.Tensor],
    processor: Any,
    hidden: torch.Tensor,
    *arguments: Any,
    **options: Any,
) -> torch.Tensor:
    """Around `LogitsProcessor._compute_lm_head`; what is to be written into a buffer stays as it is."""
    x = hidden if options.get("out") is not None else padded(hidden)
    return original(processor, x, *arguments, **options)[: len(hidden)]


def padded(x: torch.Tensor) -> torch.Tensor:
    """(n, k) as it is, or (4, k) with rows of zeros behind two or three; only where it is in float32."""
    if x.dim() == 2 and 1 < len(x) < ROWS and x.dtype == torch.float32:
        return torch.nn.functional.pad(x, (0, 0, 0, ROWS - len(x)))
    return x
