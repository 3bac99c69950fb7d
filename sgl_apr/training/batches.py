"""Batch training trees of similar length, in a random but reproducible order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from sgl_apr.errors import AprError
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


BatchPosition = tuple[int, int]  # the number of a chunk, and the number of a batch in it


def batch_stream(
    examples: Examples, max_tokens: int, seed: int, start: BatchPosition = (0, 0)
) -> Iterator[tuple[list[TrainingTree], BatchPosition]]:
    """Batches without end, each with the position of the next one, from which an interrupted run continues.

    Raises:
        AprError: If there is nothing to learn from.
    """
    number, first = start
    while True:
        batches = batch_by_length(examples.chunk(number), max_tokens, random.Random(f"{seed} {number}"))
        if not batches:
            raise AprError("nothing to learn from: no trajectory has a decoded token")
        for k in range(first, len(batches)):
            yield batches[k], (number, k + 1)
        number, first = number + 1, 0
