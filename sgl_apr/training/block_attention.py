"""Attention to the visible blocks of training trees alone, for models that train on a CPU.

A dense mask makes a kernel visit all pairs of tokens; in a tree of eight branches a token sees about one in six. FlexAttention
skips the others as well, but has no backward pass on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from sgl_apr.training.attention_mask import Visibility

BLOCK_ATTENTION = "block_sparse"
"""The name of this attention for `attn_implementation`."""
BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """Query blocks that see about as many key blocks, which one call of the kernel computes.

    Attributes:
        queries: (n,), numbers of the query blocks, counted over all rows.
        keys: (n, m), numbers of the key blocks that they see, padded with any others.
        mask: (n, 1, block, m * block), 0 where a query sees a key, -inf elsewhere.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class VisibleBlocks:
    """Which blocks of keys the blocks of queries see.

    Attributes:
        groups: All query blocks, in groups.
        order: Where the groups have each query block, in the order of rows and places.
        size: Tokens of a block.
    """

    groups: tuple[BlockGroup, ...]
    order: Tensor
    size: int

    @classmethod
    def from_visibility(cls, visibility: Visibility, size: int = BLOCK_SIZE) -> VisibleBlocks:
        """Find the blocks of queries and keys with a visible pair.

        Args:
            visibility: Which token sees which.
            size: Tokens of a block.
        """
        padded = visibility.pad_to_multiple(size)
        seen, _ = padded.touched_blocks(size)
        rows, number, _ = seen.shape
        seen = seen.flatten(0, 1)
        counts, base = seen.sum(-1), torch.arange(rows).repeat_interleave(number) * number
        widths = torch.tensor([_round_up(int(count)) for count in counts]).clamp(max=number)
        groups = []
        for width in widths.unique().tolist():
            queries = torch.nonzero(widths == width).flatten()
            own = seen[queries].int().argsort(dim=-1, descending=True, stable=True)[:, :width]
            used = torch.arange(width) < counts[queries].unsqueeze(1)
            mask = _pair_mask(padded, queries % number, queries // number, own, size)
            mask &= used.repeat_interleave(size, dim=1).unsqueeze(1)
            bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf).unsqueeze(1)
            groups.append(BlockGroup(queries, own + base[queries].unsqueeze(1), bias))
        return cls(tuple(groups), torch.cat([group.queries for group in groups]).argsort(), size)


def _round_up(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: few groups with little padding."""
    power = 1 << max(0, count.bit_length() - 1)
    return next(width for width in (power, power + power // 2, 2 * power) if width >= count)


def _pair_mask(visibility: Visibility, block: Tensor, row: Tensor, keys: Tensor, size: int) -> Tensor:
    """(n, size, m * size), True where a token of a query block sees one of the key blocks (n, m) of its row."""
    within = torch.arange(size)
    q = (block.unsqueeze(1) * size + within).unsqueeze(2)
    k = (keys.unsqueeze(2) * size + within).flatten(1).unsqueeze(1)
    return visibility.mask_mod(row.view(-1, 1, 1), row, q, k)


def block_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    visible_blocks: VisibleBlocks,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention of a layer, as Transformers' `AttentionInterface` calls it.

    Args:
        module: The layer.
        query: (rows, heads, length, dimension).
        key: (rows, key heads, length, dimension).
        value: As `key`.
        attention_mask: None; `visible_blocks` takes its place.
        visible_blocks: What sees what.
        scaling: Scale of the scores.

    Returns:
        (rows, length, heads, dimension), and None for the weights.
    """
    rows, heads, length, _dimension = query.shape
    size, shared = visible_blocks.size, heads != key.shape[1]
    q, k, v = (_split_blocks(x, size) for x in (query, key, value))
    groups = visible_blocks.groups
    queries = _take(q, [group.queries.unsqueeze(1) for group in groups])
    keys, values = (_take(x, [group.keys for group in groups]) for x in (k, v))
    parts = [
        functional.scaled_dot_product_attention(
            a, b, c, attn_mask=group.mask, scale=scaling, enable_gqa=shared
        ).transpose(1, 2)
        for group, a, b, c in zip(groups, queries, keys, values, strict=True)
    ]
    blocks = torch.cat(parts).index_select(0, visible_blocks.order)
    return blocks.view(rows, -1, *blocks.shape[2:])[:, :length], None


def _take(blocks: Tensor, groups: list[Tensor]) -> list[Tensor]:
    """For each group of numbers (n, m): (n, heads, m * size, dimension), the blocks of a row one after the other."""
    # One selection for all groups, since its gradient is as large as `blocks`; that of indexing sorts, and is slower still.
    taken = blocks.index_select(0, torch.cat([numbers.flatten() for numbers in groups]))
    parts = taken.split([numbers.numel() for numbers in groups])
    return [
        part.view(len(numbers), -1, *blocks.shape[2:]).transpose(1, 2)
        for part, numbers in zip(parts, groups, strict=True)
    ]


def _split_blocks(x: Tensor, size: int) -> Tensor:
    """(rows, heads, length, dimension) as blocks (rows * number, size, heads, dimension), the last of a row padded."""
    x = x.transpose(1, 2)
    x = functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.reshape(-1, size, *x.shape[2:])


AttentionInterface.register(BLOCK_ATTENTION, block_attention)
