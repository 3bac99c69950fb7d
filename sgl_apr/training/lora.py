"""Low-rank adapters (LoRA, arXiv 2106.09685): what a run trains in place of all weights, small enough to be shared.

An adapter also holds the embeddings of the tags, which the base model does not have. It is merged into the weights before a server
loads them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgl_apr.errors import AprError

ADAPTER_FILE = "adapter.safetensors"
SCALE = 2.0  # of the product of the two factors
TAG_ROWS = "tag_rows"
FACTORS = ("down", "up")


class LoraLinear(nn.Module):  # type: ignore[misc]  # untyped there
    """A frozen linear layer plus the product of two thin matrices, which is zero at first.

    Attributes:
        base: The layer.
        down: (rank, inputs).
        up: (outputs, rank).
    """

    def __init__(self, base: Any, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALE * ((x @ self.down.T) @ self.up.T)


class TagEmbedding(nn.Module):  # type: ignore[misc]
    """A frozen embedding whose last rows, those of the tags, are trained.

    Attributes:
        base: The embedding.
        weight: (tags, hidden), the rows of the tags.
    """

    def __init__(self, base: Any, weight: nn.Parameter) -> None:
        super().__init__()
        self.base, self.weight = base, weight

    def forward(self, ids: Tensor) -> Tensor:
        first = self.base.num_embeddings - len(self.weight)
        own = self.weight[(ids - first).clamp(min=0)]
        return torch.where((ids >= first).unsqueeze(-1), own, self.base(ids))


class TagHead(nn.Module):  # type: ignore[misc]
    """The output layer that is tied to such an embedding."""

    def __init__(self, base: Any, weight: nn.Parameter) -> None:
        super().__init__()
        self.base, self.weight = base, weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.base(x)[..., : -len(self.weight)], x @ self.weight.T], dim=-1)


def add_lora(model: Any, rank: int, added_ids: Collection[int]) -> None:
    """Freeze a model, and add factors to all linear layers of its blocks, and trained embeddings of the tags.

    Args:
        model: A Hugging Face causal language model with tied embeddings.
        rank: Rank of the products.
        added_ids: Ids of added tokens. Those at the end of the vocabulary are the tags.

    Raises:
        AprError: If the rank or the model is not usable.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    if rank < 1:
        raise AprError(f"lora_rank = {rank}, expected at least 1")
    if not model.config.tie_word_embeddings:
        raise AprError(
            "the embeddings of the model are not tied, expected a model whose output layer is its embedding"
        )
    tags = list(takewhile(lambda i: i in added_ids, reversed(range(vocabulary))))
    if not tags:
        raise AprError(
            "no tag is at the end of the model's vocabulary, expected a checkpoint to which tags were added"
        )
    model.requires_grad_(False)
    for name, layer in _linear_layers(model).items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LoraLinear(layer, rank))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = nn.Parameter(embedding.weight[-len(tags) :].detach().clone())
    model.set_input_embeddings(TagEmbedding(embedding, rows))
    model.set_output_embeddings(TagHead(head, rows))


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """What `add_lora` has added, in bfloat16, by name."""
    tensors = {
        f"{name}.{factor}": getattr(module, factor)
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
        for factor in FACTORS
    }
    tensors[TAG_ROWS] = model.get_input_embeddings().weight
    return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def merge_adapter(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add an adapter to the weights of a model that has the tags and no adapter.

    Raises:
        AprError: If the adapter belongs to another model.
    """
    layers, used = _linear_layers(model), {TAG_ROWS}
    with torch.no_grad():
        for name, layer in layers.items():
            names = [f"{name}.{factor}" for factor in FACTORS]
            if any(n not in tensors for n in names):
                raise AprError(f"the adapter has no {names[0]}, expected one for this model")
            down, up = (tensors[n].to(layer.weight.dtype) for n in names)
            if (up.shape[0], down.shape[1]) != layer.weight.shape:
                raise AprError(
                    f"{name} of the adapter is {up.shape[0]} x {down.shape[1]}, expected {tuple(layer.weight.shape)}"
                )
            layer.weight += SCALE * up @ down
            used.update(names)
        if unknown := sorted(set(tensors) - used):
            raise AprError(f"the adapter has {unknown[0]}, which the model does not have")
        table, rows = model.get_input_embeddings().weight, tensors.get(TAG_ROWS)
        if rows is None or rows.shape[1] != table.shape[1] or len(rows) > len(table):
            raise AprError(f"the adapter has no {TAG_ROWS} of the model's size")
        table[-len(rows) :] = rows.to(table.dtype)


def save_adapter(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path)


def load_adapter(path: Path) -> dict[str, Tensor]:
    """Read an adapter.

    Raises:
        AprError: If the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AprError(f"{path} cannot be read as an adapter: {error}") from None
    return tensors


def _linear_layers(model: Any) -> dict[str, Any]:
    """The linear layers of the blocks by name, without the output layer."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
