"""Plans the attention of workers in one decode step: which turned queries read each block, and what is merged for whom.

A worker's attention over all of its blocks is merged from the attentions over each block, weighted by their sums of
exponentials (https://arxiv.org/abs/2501.01005, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sgl_apr.server.shared_cache.views import WorkerView


@dataclass(frozen=True, slots=True)
class BlockReader:
    """A worker that reads a block.

    Attributes:
        batch_row: The worker's place in the batch.
        turn: Positions by which its query is turned for this block.
        place: Where its attention over this block is put before the merge: worker * parts + n for its n-th block.
    """

    batch_row: int
    turn: int
    place: int


@dataclass(frozen=True, slots=True)
class SharedBlock:
    """Slots `first` to `last` (1 or more) of a row of req_to_token, and all workers that read them."""

    row: int
    first: int
    last: int
    readers: tuple[BlockReader, ...]


@dataclass(frozen=True, slots=True)
class ViewPlan:
    """The attention of the workers of a batch.

    Attributes:
        batch_rows: The place in the batch of each worker.
        parts: Blocks of the worker that has the most of them. A worker with fewer leaves its last places empty.
        blocks: The blocks, each with all its readers.
    """

    batch_rows: tuple[int, ...]
    parts: int
    blocks: tuple[SharedBlock, ...]


def plan_views(views: Sequence[WorkerView]) -> ViewPlan:
    """Group the blocks of workers by their slots. Empty blocks are left out."""
    blocks = [[block for block in view.blocks if block.last > block.first] for view in views]
    parts = max(map(len, blocks), default=0)
    readers: dict[tuple[int, int, int], list[BlockReader]] = {}
    for worker, (view, read) in enumerate(zip(views, blocks, strict=True)):
        for place, block in enumerate(read, worker * parts):
            reader = BlockReader(view.batch_row, block.turn, place)
            readers.setdefault((block.row, block.first, block.last), []).append(reader)
    shared = (SharedBlock(*slots, tuple(found)) for slots, found in readers.items())
    return ViewPlan(tuple(view.batch_row for view in views), parts, tuple(shared))
