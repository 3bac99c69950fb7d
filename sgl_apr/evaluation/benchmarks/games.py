"""Countdown and the Game of 24 as benchmarks, for a model that has learned to write such searches."""

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
    """Different games of four cards from 1 to 13 that make 24 in whole steps, the same for the same seed.

    They end where new ones are rare; those that need a fraction on the way are left out.
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
    """Problems of three and four numbers; the size is how many."""
    cases = [Case(p.text, p, len(p.numbers)) for p in generate_problems(limit, split, seed=seed)]
    return _benchmark("countdown", cases)


def game24(limit: int, split: Split = "test", seed: int = 0) -> Benchmark:
    """Those of the games that belong to a split of Countdown, which models learn the other one of; fewer than `limit` if
    there are no more. The size is 1 where there are 8 ways and more, up to 4 where there is one."""
    mine = (game for game in game24_problems(seed) if game.split == split)
    cases = [Case(p.text, p, 5 - min(4, count_solutions(p).bit_length())) for p in islice(mine, limit)]
    return _benchmark("game24", cases)


def _benchmark(name: str, cases: list[Case]) -> Benchmark:
    return Benchmark(
        name, cases, CountdownTask, lambda case, answer: solves(case.problem, answer), BUDGET, SERVER_OPTIONS
    )
