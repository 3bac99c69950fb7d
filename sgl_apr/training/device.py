"""The device of a training run, a GPU if there is one (`CUDA_VISIBLE_DEVICES=` hides it), and a model for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sgl_apr.training.block_attention import BLOCK_ATTENTION
from sgl_apr.training.collate import Collator


def device() -> torch.device:
    """The first GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(path: Path) -> Any:
    """A causal language model in float32, with the attention that is fast on the device. It is still on the CPU."""
    attention = "sdpa" if device().type == "cuda" else BLOCK_ATTENTION
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)


def collator_for(model: Any, pad: int) -> Collator:
    """The collator whose batches the attention of a model takes."""
    return Collator(pad, "later" if model.config._attn_implementation == BLOCK_ATTENTION else "dense")
