"""Makes the work list of `decode.c` for a batch that decodes: pieces of slots, once per forward pass.

Slots that several rows have in common, as the branches of a fork do, are in one piece for all these rows, at every
level of nested forks. So they are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from sgl_apr.server.cpu.prefix_tree import PrefixNode, build_prefix_trees, unshared_rows

# Slots of a piece, at most: enough pieces for all cores, and weights that fit into a core's cache.
PIECE_SLOTS = 256
# Common slots that are worth a piece, because each of its rows has one more part to merge.
MIN_SHARED_SLOTS = 16


@dataclass(frozen=True, slots=True)
class DecodeSchedule:
    """A batch that decodes, as `decode.c` takes it. Every slot of every row is in one piece. All tensors are int64."""

    pieces: torch.Tensor  # [pieces, 6]: request, first and last slot, place in `members`, rows, first part
    members: torch.Tensor  # the rows of each piece in turn
    part_indices: torch.Tensor  # [parts]: the parts of row 0, then those of row 1, ...
    begin: torch.Tensor  # [rows + 1]: where the parts of each row begin in `part_indices`


def plan_pieces(
    slots: torch.Tensor, requests: torch.Tensor, lengths: Sequence[int], *, share: bool = True
) -> DecodeSchedule:
    """Plan a batch that decodes.

    Args:
        slots: [requests, context], SGLang's req_to_token.
        requests: [b], the batch's places in `slots`.
        lengths: Tokens of each request.
        share: Whether common slots are read once. Otherwise every row is read by itself.
    """
    places = requests.tolist()
    pieces: list[tuple[int, ...]] = []
    members: list[int] = []
    parts: list[list[int]] = [[] for _ in lengths]
    count = 0
    segments = _segments(build_prefix_trees(slots, requests, lengths) if share else unshared_rows(lengths))
    for rows, start, stop in sorted(segments, key=lambda segment: -len(segment[0])):  # long work first
        for first in range(start, stop, PIECE_SLOTS):
            piece = (places[rows[0]], first, min(first + PIECE_SLOTS, stop), len(members), len(rows), count)
            pieces.append(piece)
            for row in rows:
                parts[row].append(count)
                count += 1
        members += rows
    part_indices = [part for row in parts for part in row]
    begin = [0, *accumulate(map(len, parts))]
    return DecodeSchedule(
        *(torch.tensor(numbers, dtype=torch.long) for numbers in (pieces, members, part_indices, begin))
    )


def _segments(trees: Sequence[PrefixNode]) -> list[tuple[tuple[int, ...], int, int]]:
    """Return (rows, first, last) for the slots that each node adds to its parent.

    Slots that are too few for a segment are added by the node's children.
    """
    segments = []
    stack = [(node, 0) for node in trees]
    while stack:
        node, covered = stack.pop()
        if node.shared_length - covered >= (MIN_SHARED_SLOTS if node.children else 1):
            segments.append((node.rows, covered, node.shared_length))
            covered = node.shared_length
        stack += [(child, covered) for child in node.children]
    return segments
