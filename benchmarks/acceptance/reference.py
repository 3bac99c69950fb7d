"""The checkpoints that are served, and the reference: transformers in float32 on the CPU, with the same rounded weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sgl_apr.training.models import random_llama
from sgl_apr.trajectory.join_layout import Layout, layout_positions, masked_ranges
from tests.support.group_reference import load_reference

VOCABULARY = range(3, 400)  # token ids that are drawn; those before are special
# Attention of `random_llama` is sharp. With queries of half the size, rounding matters less and the layout still much.
QUERY_SCALE = 0.5
LARGE_SHAPE = {  # of Llama 3 8B, but for its vocabulary
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
}  # fmt: skip
SMALL_SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32000,
}  # fmt: skip


def make_checkpoint(directory: Path) -> Path:
    """Write a Llama of 4 layers with heads of 128 dimensions and random weights."""
    random_llama(directory, layers=4, hidden=512, seed=3)
    path = directory / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if name.endswith("q_proj.weight"):
            weight.mul_(QUERY_SCALE)
    save_file(weights, path, metadata={"format": "pt"})
    return directory


def make_weightless_checkpoint(directory: Path, *, large: bool) -> Path:
    """Write a checkpoint without weights, for `--load-format dummy`."""
    random_llama(directory, layers=1, hidden=64)
    (directory / "model.safetensors").unlink()
    path = directory / "config.json"
    shape = LARGE_SHAPE if large else SMALL_SHAPE
    path.write_text(json.dumps(json.loads(path.read_text()) | shape))
    return directory


class Reference:
    """A model of transformers in float32 on the CPU.

    Args:
        checkpoint: The directory.
        dtype: The precision of the served weights, as torch names it.
    """

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        self.model: Any = load_reference(checkpoint)
        with torch.no_grad():
            # Not `model.to(...)`: that would round the frequencies of the rotary embedding as well.
            for parameter in self.model.parameters():
                parameter.copy_(parameter.to(getattr(torch, dtype)).float())

    def logprobs(self, ids: Sequence[int], layout: Layout, output: Sequence[int]) -> list[float]:
        """Log-probabilities of output tokens, in nats.

        Args:
            ids: The prompt.
            layout: The layout of the prompt and of all output tokens but the last.
            output: What was decoded.
        """
        visible = _visible(layout)
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        with torch.no_grad():
            logits = self.model(
                torch.tensor([[*ids, *output[:-1]]]),
                attention_mask=mask[None, None],
                position_ids=torch.tensor([list(layout_positions(layout))]),
                use_cache=False,
            ).logits[0, len(ids) - 1 :]
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(output)[:, None])
        return list(map(float, chosen[:, 0]))


def _visible(layout: Layout) -> torch.Tensor:
    """For each token, which tokens it sees."""
    hidden = list(masked_ranges(layout))
    visible = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril()
    for row, ranges in enumerate(hidden):
        for first, last in ranges:
            visible[row, first:last] = False
    return visible
