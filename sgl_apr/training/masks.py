"""Which token of a structure sees which, for attention: a function for FlexAttention, its blocks, a dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgl_apr.training.trie import Flat

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
    def of(cls, rows: Sequence[Flat], length: int | None = None) -> Visibility:
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

    def blocks(self, **options: Any) -> Any:
        """A `BlockMask` of all rows; options are those of `create_block_mask` (BLOCK_SIZE, _compile)."""
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = self.ends.shape
        return create_block_mask(
            self.mask_mod, rows, None, length, length, device=str(self.ends.device), **options
        )

    def dense(self) -> Tensor:
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
