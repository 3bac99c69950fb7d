"""Builds trees of the rows of cache slots that begin alike.

Rows are compared slot by slot. Two requests with the same slot at the same place have the same key and value there,
whatever their tokens and positions, and however the slots are scattered. The trees are built for each batch, so
a slot that was freed and used again is never mistaken for its former content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class PrefixNode:
    """Rows whose first `shared_length` slots are the same, and no more.

    Attributes:
        rows: The rows.
        shared_length: How many slots they share.
        children: The rows split by their next slot. A leaf is one row. A row that ends where others continue is a leaf
            with the `shared_length` of its parent.
    """

    rows: tuple[int, ...]
    shared_length: int
    children: tuple[PrefixNode, ...] = ()


def unshared_rows(lengths: Sequence[int]) -> list[PrefixNode]:
    """Return a tree for each row, without comparing them."""
    return [PrefixNode((row,), length) for row, length in enumerate(lengths)]


def build_prefix_trees(
    slots: torch.Tensor, requests: torch.Tensor, lengths: Sequence[int]
) -> list[PrefixNode]:
    """Return a tree for each first slot.

    Sorted rows are next to the rows that they share most with, so n rows need n - 1 comparisons.

    Args:
        slots: [requests, context] int32 on the CPU, SGLang's req_to_token.
        requests: [n], the batch's places in `slots`.
        lengths: Row i is the first `lengths[i]` (1 or more) slots of `slots[requests[i]]`.
    """
    table = slots.numpy()
    rows = [table[request, :length] for request, length in zip(requests.tolist(), lengths, strict=True)]
    order = sorted(range(len(rows)), key=lambda row: rows[row].tobytes())
    stack: list[tuple[int, list[PrefixNode]]] = [(0, [])]  # shared slots, children so far; innermost last
    shared = [_shared_length(rows[row], rows[following]) for row, following in pairwise(order)]
    for row, length in zip(order, [*shared, 0], strict=False):
        node = PrefixNode((row,), lengths[row])
        while stack[-1][0] > length:
            inner, children = stack.pop()
            children.append(node)
            node = PrefixNode(tuple(row for child in children for row in child.rows), inner, tuple(children))
        if stack[-1][0] < length:
            stack.append((length, []))
        stack[-1][1].append(node)
    return stack[0][1]


def _shared_length(left: np.ndarray, right: np.ndarray) -> int:
    """Return how many slots two rows share before they differ or one ends."""
    size = min(len(left), len(right))
    differ = left[:size] != right[:size]
    first = int(differ.argmax())
    return first if differ[first] else size
