"""Where a training run computes: on a GPU where there is one. `CUDA_VISIBLE_DEVICES=` hides them."""

from __future__ import annotations

import torch


def device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
