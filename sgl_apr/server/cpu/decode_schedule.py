"""Makes the work list of `decode.c` for a batch that decodes: pieces of slots, once per forward pass.

Slots that several rows have in common, as the branches of a fork do, are in one piece for all these rows, at every
level of nested forks. So they are read once. The same holds for blocks that several workers of a group read, each with
its query turned for the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

import torch

from sgl_apr.server.cpu.prefix_tree import PrefixNode, build_prefix_trees, unshared_rows
from sgl_apr.server.shared_cache.view_plan import ViewPlan

# Slots of a piece, at most: enough pieces for all cores, and weights that fit into a core's cache.
PIECE_SLOTS = 256
# Common slots that are worth a piece, because each of its rows has one more part to merge.
MIN_SHARED_SLOTS = 16


@dataclass(frozen=True, slots=True)
class DecodeSchedule:
    """A batch that decodes, as `decode.c` takes it. Every slot of every row is in one piece. All tensors are int64."""

    pieces: torch.Tensor  # [pieces, 6]: request, first and last slot, place in `members`, rows, first part
    members: torch.Tensor  # the rows of queries of each piece in turn
    part_indices: torch.Tensor  # [parts]: the parts of row 0, then those of row 1, ...
    begin: torch.Tensor  # [rows + 1]: where the parts of each row begin in `part_indices`


def plan_pieces(
    slots: torch.Tensor,
    requests: torch.Tensor,
    lengths: Sequence[int],
    *,
    share: bool = True,
    views: ViewPlan | None = None,
    turned_rows: Mapping[tuple[int, int], int] = MappingProxyType({}),
) -> DecodeSchedule:
    """Plan a batch that decodes.

    Args:
        slots: [requests, context], SGLang's req_to_token.
        requests: [b], the batch's places in `slots`.
        lengths: Tokens of each request.
        share: Whether common slots are read once. Otherwise every row is read by itself.
        views: What the workers of groups attend to, instead of to their own request.
        turned_rows: By (batch row, turn), the row of queries that has the turned query of a worker.
    """
    workers = set() if views is None else set(views.batch_rows)
    rows = [row for row in range(len(lengths)) if row not in workers]
    owners, own_lengths = requests[rows] if workers else requests, [lengths[row] for row in rows]
    trees = build_prefix_trees(slots, owners, own_lengths) if share else unshared_rows(own_lengths)
    places = owners.tolist()
    # For each segment: its request, first and last slot, and for each reader the row of its query and of its output.
    segments = [
        (places[found[0]], start, stop, [(rows[i], rows[i]) for i in found])
        for found, start, stop in _segments(trees)
    ]
    for block in () if views is None else views.blocks:
        readers = [(turned_rows[reader.batch_row, reader.turn], reader.batch_row) for reader in block.readers]
        segments.append((block.row, block.first, block.last, readers))

    pieces: list[tuple[int, ...]] = []
    members: list[int] = []
    parts: list[list[int]] = [[] for _ in lengths]
    count = 0
    for request, start, stop, readers in sorted(
        segments, key=lambda segment: -len(segment[3])
    ):  # long work first
        for first in range(start, stop, PIECE_SLOTS):
            last = min(first + PIECE_SLOTS, stop)
            pieces.append((request, first, last, len(members), len(readers), count))
            for _, row in readers:
                parts[row].append(count)
                count += 1
        members += [query for query, _ in readers]
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
