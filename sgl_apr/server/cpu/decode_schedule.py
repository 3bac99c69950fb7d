"""What `decode.c` works on: a batch that decodes, in pieces of slots, made once per forward pass.

Slots that several rows have in common, as the branches of a fork do, are pieces of all these rows, at every level of
nested forks: read once, whoever sees them. No keys or values are touched here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from sgl_apr.server.cpu.prefix_tree import PrefixNode, build_prefix_trees, unshared_rows

PIECE_SLOTS = (
    256  # slots in a piece, at most: enough pieces for all cores, and weights that stay near each of them
)
MIN_SHARED_SLOTS = 16  # slots in common that are worth a piece: each of its rows has one more part to merge


@dataclass(frozen=True, slots=True)
class DecodeSchedule:
    """A batch that decodes, as `decode.c` takes it; every slot of every row is in one piece. All are int64."""

    pieces: torch.Tensor  # [pieces, 6]: request, first and last slot, place in `members`, rows, first part
    members: torch.Tensor  # the rows of every piece in turn
    part_indices: torch.Tensor  # [parts]: the parts of row 0, then those of row 1, ...
    begin: torch.Tensor  # [rows + 1]: where they begin in `found`


def plan_pieces(
    slots: torch.Tensor, requests: torch.Tensor, lengths: Sequence[int], *, share: bool = True
) -> DecodeSchedule:
    """`slots` [requests, context] is SGLang's req_to_token, `requests` [b] the batch's places in it.

    Without `share` every row is read by itself.
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
    found = [part for row in parts for part in row]
    begin = [0, *accumulate(map(len, parts))]
    return DecodeSchedule(
        *(torch.tensor(numbers, dtype=torch.long) for numbers in (pieces, members, found, begin))
    )


def _segments(trees: Sequence[PrefixNode]) -> list[tuple[tuple[int, ...], int, int]]:
    """(rows, first, last): what every node adds to its parent; what is too short is added by its children."""
    found = []
    todo = [(node, 0) for node in trees]
    while todo:
        node, known = todo.pop()
        if node.shared_length - known >= (MIN_SHARED_SLOTS if node.children else 1):
            found.append((node.rows, known, node.shared_length))
            known = node.shared_length
        todo += [(child, known) for child in node.children]
    return found
