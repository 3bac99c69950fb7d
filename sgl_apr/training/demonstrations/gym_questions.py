"""Puzzles of reasoning-gym as questions, small enough for a small model."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sgl_apr.errors import require_extra
from sgl_apr.training.demonstrations.topics import Question, Split, capitalized

POOL_SIZE = 400  # puzzles of each dataset
EDITS = (  # instructions about the form of a reply, which has another form here
    (r"(?<=[.?]) Give only .*$", ""),
    (r"^Your task is to count how many legs there are in total when given a list of animals\. Now, ", ""),
    (r"^State the final answer to the following arithmetic problem: (.*) =$", r"Calculate \1."),
)


@dataclass(frozen=True, slots=True)
class GymDataset:
    """A dataset, and how its puzzles are named and answered.

    Attributes:
        label: Names a puzzle in an outline.
        options: Its size.
        held_out: Whether the dataset is in the test split alone.
    """

    label: str
    options: Mapping[str, Any]
    held_out: bool = False


DATASETS = {
    "chain_sum": GymDataset("sum", {"min_terms": 2, "max_terms": 2, "max_digits": 2}),
    "gcd": GymDataset("greatest common divisor", {"min_value": 2, "max_value": 24}),
    "simple_equations": GymDataset(
        "equation", {"max_terms": 2, "min_value": 1, "max_value": 10, "operators_weights": (0.5, 0.5, 0.0)}
    ),
    "letter_counting": GymDataset("count of a letter", {"min_words": 2, "max_words": 5}),
    "leg_counting": GymDataset(
        "number of legs", {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 5}
    ),
    "prime_factorization": GymDataset("prime factors", {"min_value": 4, "max_value": 60}),
    "spell_backward": GymDataset("word backward", {"min_word_len": 3, "max_word_len": 5}, held_out=True),
    "lcm": GymDataset("least common multiple", {"min_value": 2, "max_value": 12, "max_numbers": 2}, held_out=True),
    "products": GymDataset(
        "product", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, held_out=True
    ),
}  # fmt: skip


def ask_puzzle(rng: random.Random, split: Split) -> Question:
    """A random puzzle.

    Raises:
        MissingExtra: If reasoning-gym is not installed.
    """
    name = rng.choice([n for n, dataset in DATASETS.items() if dataset.held_out == (split == "test")])
    return rng.choice(_pool(name))


@cache
def _pool(name: str) -> tuple[Question, ...]:
    require_extra("reasoning_gym", "gym", "puzzles in demonstrations need reasoning-gym")
    from reasoning_gym import create_dataset

    dataset = DATASETS[name]
    puzzles = create_dataset(name, size=POOL_SIZE, seed=0, **dataset.options)
    return tuple(
        _question(name, dataset.label, puzzle["question"], str(puzzle["answer"])) for puzzle in puzzles
    )


def _question(name: str, label: str, text: str, answer: str) -> Question:
    text = " ".join(text.split())
    for pattern, replacement in EDITS:
        text = re.sub(pattern, replacement, text).strip()
    text = capitalized(text)
    return Question(name, text, text, answer, f"The answer is {answer}.", label)
