"""What the attention of one decode step reads for the workers of groups whose queries are turned for each block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockView:
    """Consecutive slots of one row of SGLang's req_to_token, and how far a worker's query is turned for them.

    Attributes:
        row: A row of req_to_token.
        first: The first slot's place in the row.
        last: The place after the last slot. It may equal `first`: such a block is empty and adds nothing.
        turn: Positions by which the query is turned further than the model has turned it. It may be negative.
    """

    row: int
    first: int
    last: int
    turn: int


@dataclass(frozen=True, slots=True)
class WorkerView:
    """Everything that one worker attends to in one decode step, its own new token included.

    Attributes:
        batch_row: The worker's place in the batch.
        blocks: The blocks. Workers that read the same slots name them with the same row, first and last.
    """

    batch_row: int
    blocks: tuple[BlockView, ...]
