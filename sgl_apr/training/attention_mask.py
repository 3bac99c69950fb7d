"""Attention masks of training trees: a function and a `BlockMask` for FlexAttention, or a dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgl_apr.training.trie import FlatTree

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which token sees which, for rows of tokens.

    Token q sees token k if `k <= q < ends[k]`, or if q lies in one of the ranges `joined[k]`. Padding sees only itself, and
    nothing else sees it.

    Attributes:
        ends: (rows, length), int32.
        joined: (rows, joins, length, 2), int32, ranges [first, last); `joins` is the largest number of any token.
    """

    ends: Tensor
    joined: Tensor

    @classmethod
    def from_trees(cls, rows: Sequence[FlatTree], length: int | None = None) -> Visibility:
        """The visibility of trees, one in each row, padded to a length (by default that of the longest)."""
        length = length or max(len(row.ends) for row in rows)
        ends = np.tile(np.arange(1, length + 1, dtype=np.int32), (len(rows), 1))
        places = [_places(row.joined[:, 0]) for row in rows]
        joins = max((int(place.max(initial=-1)) + 1 for place in places), default=0)
        joined = np.zeros((len(rows), joins, length, 2), dtype=np.int32)
        for k, (row, place) in enumerate(zip(rows, places, strict=True)):
            ends[k, : len(row.ends)] = row.ends
            joined[k, place, row.joined[:, 0]] = row.joined[:, 1:]
        return cls(torch.from_numpy(ends), torch.from_numpy(joined))

    def to(self, device: torch.device | str) -> Visibility:
        """The same on another device."""
        return Visibility(self.ends.to(device), self.joined.to(device))

    @property
    def mask_mod(self) -> MaskMod:
        """The mask as a function for `torch.nn.attention.flex_attention`; its memory is linear in the tokens."""
        ends, joined = self.ends, self.joined

        def sees(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k <= q) & (q < ends[row, k])
            for j in range(joined.shape[1]):
                seen = seen | ((joined[row, j, k, 0] <= q) & (q < joined[row, j, k, 1]))
            return seen

        return sees

    def block_mask(self, size: int = 128) -> Any:
        """A `BlockMask` of all rows for FlexAttention, in blocks of `size` tokens.

        FlexAttention's `create_block_mask` computes the complete matrix to find which blocks have visible tokens (gigabytes for
        28,000 tokens).
        """
        from torch.nn.attention.flex_attention import BlockMask

        some, full = self.touched_blocks(size)
        length = self.ends.shape[1]
        return BlockMask.from_kv_blocks(
            *_ordered(some & ~full),
            *_ordered(full),
            BLOCK_SIZE=size,
            mask_mod=self.mask_mod,
            seq_lengths=(length, length),
        )

    def touched_blocks(self, size: int) -> tuple[Tensor, Tensor]:
        """Which blocks of `size` queries and keys have a visible pair, and which have only such, (rows, blocks, blocks) each.

        Intervals give that for a block of queries and one key at a time. A block counts as full only if each of its keys is
        visible to all queries in one interval; a full block that is not counted as one is no less correct.
        """
        rows, length = self.ends.shape
        number = -(-length // size)
        first = torch.arange(number, device=self.ends.device).unsqueeze(1) * size  # first query of each block
        last = (first + size).clamp(max=length)
        shape = (rows, number, number * size)
        touched = torch.zeros(shape, dtype=torch.bool, device=self.ends.device)
        filled = touched.clone()
        for begin, end in self._intervals():
            begin, end = begin.unsqueeze(1), end.unsqueeze(1)
            touched[..., :length] |= (begin < last) & (end > first) & (begin < end)
            filled[..., :length] |= (begin <= first) & (end >= first + size)
        return (
            touched.view(rows, number, number, size).any(-1),
            filled.view(rows, number, number, size).all(-1),
        )

    def pad_to_multiple(self, size: int) -> Visibility:
        """The same with padding up to a multiple of `size` tokens."""
        length = self.ends.shape[1]
        more = -length % size
        own = torch.arange(length + 1, length + 1 + more, dtype=torch.int32, device=self.ends.device)
        ends = torch.cat([self.ends, own.expand(len(self.ends), -1)], dim=1)
        return Visibility(ends, torch.nn.functional.pad(self.joined, (0, 0, 0, more)))

    def _intervals(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ranges [first, last) of the queries that see each key, (rows, length) each."""
        yield torch.arange(self.ends.shape[1], device=self.ends.device).unsqueeze(0), self.ends
        for j in range(self.joined.shape[1]):
            yield self.joined[:, j, :, 0], self.joined[:, j, :, 1]

    def dense_mask(self) -> Tensor:
        """(rows, 1, length, length), True where a query (third axis) sees a key; memory is quadratic in the tokens."""
        rows, length = self.ends.shape
        at = torch.arange(length, device=self.ends.device)
        row = torch.arange(rows, device=self.ends.device).view(-1, 1, 1)
        return self.mask_mod(row, row, at.view(1, -1, 1), at.view(1, 1, -1)).unsqueeze(1)


def _places(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Number the rows of `joined` that belong to the same token: 0, 1, ..."""
    order = np.argsort(tokens, kind="stable")
    ordered = tokens[order]
    begins = np.r_[True, ordered[1:] != ordered[:-1]] if len(ordered) else np.empty(0, dtype=bool)
    firsts = np.maximum.accumulate(np.where(begins, np.arange(len(ordered)), 0))
    places = np.empty(len(tokens), dtype=np.int64)
    places[order] = np.arange(len(ordered)) - firsts
    return places


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Convert (rows, n, n) to FlexAttention's format: the number of key blocks of each query block, and their indices."""
    which = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), which.int().unsqueeze(1)
