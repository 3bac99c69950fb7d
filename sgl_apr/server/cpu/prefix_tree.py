"""Which rows of cache slots begin alike, as a tree; what is to be gained by that is decided elsewhere.

Rows are compared slot by slot: two requests that see the same slot at the same place see the same key and value
there, whatever the tokens and positions, and however the slots are strewn. Nothing is remembered from one batch to
the next, so slots that were freed and used again cannot be taken for what they held before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class PrefixNode:
    """Rows that agree on their first `common` slots, and on no more; `children` part them, a leaf is one row.

    A row that ends where others go on is a leaf among them, with the `common` of its parent.
    """

    rows: tuple[int, ...]
    shared_length: int
    children: tuple[PrefixNode, ...] = ()


def unshared_rows(lengths: Sequence[int]) -> list[PrefixNode]:
    """Rows of which none is compared with another."""
    return [PrefixNode((row,), length) for row, length in enumerate(lengths)]


def build_prefix_trees(
    slots: torch.Tensor, requests: torch.Tensor, lengths: Sequence[int]
) -> list[PrefixNode]:
    """A tree for each first slot. Row i is the first `lengths[i]` (1 or more) of `slots[requests[i]]`.

    `slots` is SGLang's req_to_token, [requests, context] int32 on the CPU. Rows that are sorted lie beside those
    with which they have most in common, so n rows need n - 1 comparisons.
    """
    table = slots.numpy()
    rows = [table[request, :length] for request, length in zip(requests.tolist(), lengths, strict=True)]
    order = sorted(range(len(rows)), key=lambda row: rows[row].tobytes())
    stack: list[tuple[int, list[PrefixNode]]] = [(0, [])]  # common slots, children so far; innermost last
    shared = [_common(rows[row], rows[after]) for row, after in pairwise(order)]
    for row, common in zip(order, [*shared, 0], strict=False):
        node = PrefixNode((row,), lengths[row])
        while stack[-1][0] > common:
            inner, children = stack.pop()
            children.append(node)
            node = PrefixNode(tuple(row for child in children for row in child.rows), inner, tuple(children))
        if stack[-1][0] < common:
            stack.append((common, []))
        stack[-1][1].append(node)
    return stack[0][1]


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """How many slots two rows have in common before they part or one ends."""
    size = min(len(left), len(right))
    differ = left[:size] != right[:size]
    first = int(differ.argmax())
    return first if differ[first] else size
