"""Trees of a chunk as batches of about the same length, in an order of their own; no model is asked."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from sgl_apr.errors import AprError
from sgl_apr.training.examples import Examples
from sgl_apr.training.training_tree import TrainingTree


def batch_by_length(
    trees: Sequence[TrainingTree], max_tokens: int, rng: random.Random
) -> list[list[TrainingTree]]:
    """Trees of like length together, so that little is padding, in batches of at most so many tokens."""
    made: list[list[TrainingTree]] = []
    longest = 0
    for tree in sorted((t for t in trees if len(t.sources)), key=lambda t: t.tokens):
        if tree.tokens > max_tokens:
            raise AprError(f"a tree of {tree.tokens} tokens does not fit into a batch of {max_tokens}")
        longest = max(longest, tree.tokens)
        if not made or longest * (len(made[-1]) + 1) > max_tokens:
            made.append([])
            longest = tree.tokens
        made[-1].append(tree)
    rng.shuffle(made)
    return made


BatchPosition = tuple[int, int]  # the number of a chunk, and of a batch in it


def batch_stream(
    examples: Examples, max_tokens: int, seed: int, begin: BatchPosition = (0, 0)
) -> Iterator[tuple[list[TrainingTree], BatchPosition]]:
    """Batches without end, each with the place of the one behind it, where a run that is taken up begins."""
    number, first = begin
    while True:
        made = batch_by_length(examples.chunk(number), max_tokens, random.Random(f"{seed} {number}"))
        if not made:
            raise AprError("nothing to learn from: no trajectory has a decoded token")
        for k in range(first, len(made)):
            yield made[k], (number, k + 1)
        number, first = number + 1, 0
