"""Batch training trees, of similar length or packed into rows, in a random but reproducible order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from sgl_apr.errors import AprError
from sgl_apr.training.collate import pack_rows
from sgl_apr.training.examples import Examples
from sgl_apr.training.training_tree import TrainingTree


def batch_by_length(
    trees: Sequence[TrainingTree], max_tokens: int, rng: random.Random
) -> list[list[TrainingTree]]:
    """Group trees of similar length, so that there is little padding, and shuffle the batches.

    Args:
        trees: The trees; those without a loss are left out.
        max_tokens: Tokens of a batch at most, padding included.
        rng: Shuffles the batches.

    Raises:
        AprError: If a tree has more tokens than that.
    """
    batches: list[list[TrainingTree]] = []
    longest = 0
    for tree in sorted((t for t in trees if len(t.sources)), key=lambda t: t.tokens):
        if tree.tokens > max_tokens:
            raise AprError(f"a tree of {tree.tokens} tokens does not fit into a batch of {max_tokens}")
        longest = max(longest, tree.tokens)
        if not batches or longest * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            longest = tree.tokens
        batches[-1].append(tree)
    rng.shuffle(batches)
    return batches


def batch_packed_rows(
    trees: Sequence[TrainingTree], max_tokens: int, row_tokens: int, rng: random.Random
) -> list[list[list[TrainingTree]]]:
    """Pack trees into rows in random order, so that each batch has trees of all lengths.

    Args:
        trees: The trees; those without a loss are left out.
        max_tokens: Tokens of a batch at most.
        row_tokens: Tokens of a row.
        rng: Shuffles the trees and the batches.

    Returns:
        Batches of rows of trees.

    Raises:
        AprError: If a tree does not fit into a row, or a row into a batch.
    """
    if row_tokens > max_tokens:
        raise AprError(f"rows of {row_tokens} tokens do not fit into batches of {max_tokens}")
    used = [tree for tree in trees if len(tree.sources)]
    rows = list(pack_rows(rng.sample(used, len(used)), row_tokens))
    size = max_tokens // row_tokens
    batches = [rows[k : k + size] for k in range(0, len(rows), size)]
    rng.shuffle(batches)
    return batches


BatchPosition = tuple[int, int]  # the number of a chunk, and the number of a batch in it


def batch_stream(
    examples: Examples, max_tokens: int, seed: int, start: BatchPosition = (0, 0), *, row_tokens: int = 0
) -> Iterator[tuple[list[list[TrainingTree]], BatchPosition]]:
    """Batches without end, each with the position of the next one, from which an interrupted run continues.

    Args:
        examples: The trees.
        max_tokens: Tokens of a batch at most, padding included.
        seed: Seed of the order.
        start: The position of the first batch.
        row_tokens: Pack the trees into rows of so many tokens. 0: each row has one tree, and a batch those of similar length.

    Yields:
        A batch, as rows of trees, and the position of the next one.

    Raises:
        AprError: If there is nothing to learn from.
    """
    number, first = start
    while True:
        trees, rng = examples.chunk(number), random.Random(f"{seed} {number}")
        if row_tokens:
            batches = batch_packed_rows(trees, max_tokens, row_tokens, rng)
        else:
            batches = [[[tree] for tree in batch] for batch in batch_by_length(trees, max_tokens, rng)]
        if not batches:
            raise AprError("nothing to learn from: no trajectory has a decoded token")
        for k in range(first, len(batches)):
            yield batches[k], (number, k + 1)
        number, first = number + 1, 0
