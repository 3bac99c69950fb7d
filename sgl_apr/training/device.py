"""The device of a training run: a GPU if there is one (`CUDA_VISIBLE_DEVICES=` hides it)."""

from __future__ import annotations

import torch


def device() -> torch.device:
    """The first GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
