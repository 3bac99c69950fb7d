"""Countdown and the Game of 24 as benchmarks, for a model that was trained on such searches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

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

BUDGET = Budget(tokens=6000, width=16, branch_tokens=160)
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


def countdown(limit: int, split: Split = "test", seed: int = 0) -> Benchmark:
    """Countdown with three and four numbers; the size of a problem is how many numbers it has."""
    cases = [Case(p.text, p, len(p.numbers)) for p in generate_problems(limit, split, seed=seed)]
    return _benchmark("countdown", cases)


def game24(limit: int, split: Split = "test", seed: int = 0) -> Benchmark:
    """Game of 24, restricted to the games in a split of Countdown, so that a model was not trained on them.

    There may be fewer than `limit`. The size is 1 for a game with 8 solutions or more, up to 4 for a game with one.
    """
    games = (game for game in game24_problems(seed) if game.split == split)
    cases = [Case(p.text, p, 5 - min(4, count_solutions(p).bit_length())) for p in islice(games, limit)]
    return _benchmark("game24", cases)


def _benchmark(name: str, cases: list[Case]) -> Benchmark:
    return Benchmark(
        name, cases, CountdownTask, lambda case, answer: solves(case.problem, answer), BUDGET, SERVER_OPTIONS
    )
