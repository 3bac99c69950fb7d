"""Countdown and the Game of 24 as benchmarks, for a model that was trained on such searches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

from sgl_apr.errors import AprError
from sgl_apr.evaluation.benchmarks.base import Benchmark, Case
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS
from sgl_apr.evaluation.tasks.countdown.problems import (
    MAX_TRIES,
    Problem,
    Split,
    count_solutions,
    generate_problems,
    solves,
)
from sgl_apr.evaluation.tasks.countdown.task import CountdownTask
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.value_checks import shorten

BUDGET = Budget(tokens=6000)  # no other limit: one for branches would cut the replies of methods that sample
SIZES, UNSOLVABLE = ("2", "3", "4", "5", "6"), "unsolvable"
GAME24_TARGET, GAME24_CARDS, GAME24_LARGEST_CARD = 24, 4, 13


def game24_problems(seed: int = 0) -> Iterator[Problem]:
    """Different games of four cards from 1 to 13 that reach 24 without fractions, the same for the same seed.

    The iterator ends when hardly any new game can be found.
    """
    rng, seen, tries = random.Random(seed), set[Problem](), 0
    while (tries := tries + 1) <= MAX_TRIES:
        game = Problem(
            tuple(sorted(rng.randint(1, GAME24_LARGEST_CARD) for _ in range(GAME24_CARDS))), GAME24_TARGET
        )
        if game not in seen and count_solutions(game):
            seen.add(game)
            tries = 0
            yield game


def countdown(limit: int, split: Split = "test", seed: int = 0, variant: str = "") -> Benchmark:
    """Countdown; the size of a problem is how many numbers it has.

    Args:
        limit: Problems at most.
        split: Their split.
        seed: Their seed.
        variant: By default three and four numbers, with a solution. "5" is five numbers, "unsolvable" is without a solution,
            and "5,unsolvable" is both.

    Raises:
        AprError: If there is no such variant.
    """
    parts = [part for part in variant.split(",") if part]
    sizes = [int(part) for part in parts if part in SIZES]
    unknown = [part for part in parts if part not in (*SIZES, UNSOLVABLE)]
    if unknown or len(sizes) > 1:
        raise AprError(
            f"no variant {shorten(variant)} of countdown, expected one of {', '.join(SIZES)}, and {UNSOLVABLE}"
        )
    numbers = tuple(sizes) or (3, 4, 4, 4)
    problems = generate_problems(limit, split, seed=seed, numbers=numbers, solvable=UNSOLVABLE not in parts)
    cases = [Case(p.text, p, len(p.numbers)) for p in problems]
    return _benchmark(f"countdown:{variant}" if variant else "countdown", cases)


def game24(limit: int, split: Split = "test", seed: int = 0) -> Benchmark:
    """Game of 24, restricted to the games in a split of Countdown, so that a model was not trained on them.

    There may be fewer than `limit`. The size is 1 for a game with 8 solutions or more, up to 4 for a game with one.
    """
    games = (game for game in game24_problems(seed) if game.split == split)
    cases = [Case(p.text, p, 5 - min(4, count_solutions(p).bit_length())) for p in islice(games, limit)]
    return _benchmark("game24", cases)


def _benchmark(name: str, cases: list[Case]) -> Benchmark:
    return Benchmark(name, cases, CountdownTask, is_right, BUDGET, SERVER_OPTIONS)


def is_right(case: Case, answer: str) -> bool:
    """Whether an answer is a solution; where there is none, whether none is claimed."""
    return solves(case.problem, answer) if count_solutions(case.problem) else not answer.strip()
