"""Batches of training trees: every tree once, of all lengths where they are packed, and the position from which a run continues."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest

import sgl_apr as apr
from sgl_apr.training.batches import batch_by_length, batch_packed_rows, batch_stream
from sgl_apr.training.training_tree import TrainingTree, build_training_tree

TOKENIZER = apr.ByteTokenizer(apr.dialect("threadweaver").tags)


def tree(length: int) -> TrainingTree:
    reading = apr.read("x" * (length - 1), "threadweaver", prompt="?", tokenizer=TOKENIZER)
    return build_training_tree([reading.trajectory])


TREES = [tree(length) for length in (5, 40, 6, 41, 7, 42, 8, 39)]


def lengths(batch: list[list[TrainingTree]]) -> list[list[int]]:
    return [[t.tokens for t in row] for row in batch]


def test_packed_batches_have_every_tree_once_and_all_lengths():
    without_loss = tree(4)
    without_loss = TrainingTree(without_loss.tree, *(np.empty(0, np.int32) for _ in range(4)))
    batches = batch_packed_rows([*TREES, without_loss], 100, 50, random.Random(0))
    assert sorted(n for batch in batches for row in lengths(batch) for n in row) == sorted(
        t.tokens for t in TREES
    )
    assert all(len(batch) <= 2 and all(sum(row) <= 50 for row in lengths(batch)) for batch in batches)
    kinds = [{n > 20 for row in lengths(batch) for n in row} for batch in batches]
    assert {True, False} in kinds
    by_length = batch_by_length(TREES, 100, random.Random(0))
    assert all(len({t.tokens > 20 for t in batch}) == 1 for batch in by_length)


def test_too_small_rows_and_batches_are_errors():
    with pytest.raises(apr.AprError, match="does not fit into a row of 30"):
        batch_packed_rows(TREES, 100, 30, random.Random(0))
    with pytest.raises(apr.AprError, match="rows of 200 tokens do not fit into batches of 100"):
        batch_packed_rows(TREES, 100, 200, random.Random(0))


@pytest.mark.parametrize("row_tokens", [0, 50])
def test_a_stream_continues_at_its_position(row_tokens: int):
    class Examples:
        def chunk(self, number: int) -> list[TrainingTree]:
            return TREES

    first = list(islice(batch_stream(Examples(), 100, 3, row_tokens=row_tokens), 8))
    for k in (1, 4, 6):
        again = next(batch_stream(Examples(), 100, 3, first[k - 1][1], row_tokens=row_tokens))
        assert lengths(again[0]) == lengths(first[k][0])
