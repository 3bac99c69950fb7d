"""Which token of a structure sees which, for attention: a function for FlexAttention, its blocks, a dense matrix."""

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
    """Of rows of tokens, as tensors: token k is seen by q if k <= q < ends[k], or from first to last of one of its
    `joined`. Padding is seen by nothing but itself.

    ends: (rows, length). joined: (rows, joins, length, 2), with as many joins as the token that has most.
    """

    ends: Tensor
    joined: Tensor

    @classmethod
    def from_trees(cls, rows: Sequence[FlatTree], length: int | None = None) -> Visibility:
        """That of trees, one in a row each, padded to a length."""
        length = length or max(len(row.ends) for row in rows)
        ends = np.tile(np.arange(1, length + 1, dtype=np.int32), (len(rows), 1))
        places = [_places(row.joined[:, 0]) for row in rows]
        most = max((int(place.max(initial=-1)) + 1 for place in places), default=0)
        joined = np.zeros((len(rows), most, length, 2), dtype=np.int32)
        for k, (row, place) in enumerate(zip(rows, places, strict=True)):
            ends[k, : len(row.ends)] = row.ends
            joined[k, place, row.joined[:, 0]] = row.joined[:, 1:]
        return cls(torch.from_numpy(ends), torch.from_numpy(joined))

    def to(self, device: torch.device | str) -> Visibility:
        """The same on another device."""
        return Visibility(self.ends.to(device), self.joined.to(device))

    @property
    def mask_mod(self) -> MaskMod:
        """For `torch.nn.attention.flex_attention`; memory is linear in the tokens."""
        ends, joined = self.ends, self.joined

        def sees(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k <= q) & (q < ends[row, k])
            for j in range(joined.shape[1]):
                seen = seen | ((joined[row, j, k, 0] <= q) & (q < joined[row, j, k, 1]))
            return seen

        return sees

    def block_mask(self, size: int = 128) -> Any:
        """A `BlockMask` of all rows for FlexAttention, in blocks of `size` tokens.

        Its own `create_block_mask` computes the whole matrix to count what is seen in each block (gigabytes for
        28,000 tokens); intervals say the same of a block and one key at a time. A block counts as full only where
        each key is seen by all of it in one interval: as partial it is no less right.
        """
        from torch.nn.attention.flex_attention import BlockMask

        rows, length = self.ends.shape
        number = -(-length // size)
        first = torch.arange(number, device=self.ends.device).unsqueeze(1) * size  # of the queries of a block
        last = (first + size).clamp(max=length)
        shape = (rows, number, number * size)
        touched = torch.zeros(shape, dtype=torch.bool, device=self.ends.device)
        filled = touched.clone()
        for begin, end in self._intervals():
            begin, end = begin.unsqueeze(1), end.unsqueeze(1)
            touched[..., :length] |= (begin < last) & (end > first) & (begin < end)
            filled[..., :length] |= (begin <= first) & (end >= first + size)
        some = touched.view(rows, number, number, size).any(-1)
        full = filled.view(rows, number, number, size).all(-1)
        return BlockMask.from_kv_blocks(
            *_ordered(some & ~full),
            *_ordered(full),
            BLOCK_SIZE=size,
            mask_mod=self.mask_mod,
            seq_lengths=(length, length),
        )

    def _intervals(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(first, last) of the queries that see each key, (rows, length) each."""
        yield torch.arange(self.ends.shape[1], device=self.ends.device).unsqueeze(0), self.ends
        for j in range(self.joined.shape[1]):
            yield self.joined[:, j, :, 0], self.joined[:, j, :, 1]

    def dense_mask(self) -> Tensor:
        """(rows, 1, length, length), True where a query (third axis) sees a key; memory is quadratic."""
        rows, length = self.ends.shape
        at = torch.arange(length, device=self.ends.device)
        row = torch.arange(rows, device=self.ends.device).view(-1, 1, 1)
        return self.mask_mod(row, row, at.view(1, -1, 1), at.view(1, 1, -1)).unsqueeze(1)


def _places(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """For every row of `joined` the how manieth of its token it is."""
    order = np.argsort(tokens, kind="stable")
    ordered = tokens[order]
    begins = np.r_[True, ordered[1:] != ordered[:-1]] if len(ordered) else np.empty(0, dtype=bool)
    firsts = np.maximum.accumulate(np.where(begins, np.arange(len(ordered)), 0))
    places = np.empty(len(tokens), dtype=np.int64)
    places[order] = np.arange(len(ordered)) - firsts
    return places


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, n, n) as FlexAttention has it, for all heads: how many blocks of keys each block of queries has, and which."""
    which = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), which.int().unsqueeze(1)
