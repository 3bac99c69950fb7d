"""Countdown: combine all given numbers to reach a target. Generated problems, and an exact verifier."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from sgl_apr.errors import AprError

LARGEST_INTERMEDIATE = 99  # so that every number is one token of a small vocabulary
LARGEST_NUMBER, TARGET_RANGE = 25, (10, 99)  # bounds of the given numbers, and of targets
MAX_TRIES = 20_000  # without a new problem, after which hardly any is left
MAX_SOLUTIONS = 6  # of a generated problem; with more, almost any steps solve it
MAX_SOLUTIONS_OF_SIX = 600  # of six numbers, of which hardly any problem has fewer
STEP = re.compile(r" (\d{1,4})([-+*/]) (\d{1,4})= (\d{1,4})")
Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on two numbers.

    Attributes:
        a: The larger number of a subtraction or division, the smaller one of a sum or product.
        operator: One of "+-*/".
        b: The other number.
        result: The result that the step claims.
    """

    a: int
    operator: str
    b: int
    result: int

    @property
    def text(self) -> str:
        """The step as a solution writes it.

        Examples:
            >>> Step(12, "-", 8, 4).text
            ' 12- 8= 4'
        """
        return f" {self.a}{self.operator} {self.b}= {self.result}"

    @property
    def is_correct(self) -> bool:
        """Whether the result is right, and a positive whole number."""
        a, b = self.a, self.b
        results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else 0}
        return self.result == results[self.operator] > 0


@dataclass(frozen=True, slots=True)
class Problem:
    """Numbers in ascending order, and the target to make of all of them."""

    numbers: tuple[int, ...]
    target: int

    @property
    def text(self) -> str:
        """The problem as a model reads it.

        Examples:
            >>> Problem((3, 7, 8, 12), 24).text
            ' 24: 3 7 8 12'
        """
        return f" {self.target}:" + "".join(f" {n}" for n in self.numbers)

    def prompt(self, width: int | None = None) -> str:
        """The problem; with a width, also how many branches each fork of the reply is to have.

        Examples:
            >>> Problem((3, 7, 8, 12), 24).prompt(width=4)
            ' 24: 3 7 8 12; 4'
        """
        return self.text if width is None else f"{self.text}; {width}"

    @classmethod
    def parse(cls, text: str) -> Problem:
        """The problem at the start of a text; raises `AprError` for any other text."""
        match = re.match(r" (\d{1,4}):((?: \d{1,4})+)(?!\d)", text)
        if not match:
            raise AprError(f"expected a problem like ' 24: 3 7 8 12', found {text[:40]!r}")
        return cls(tuple(sorted(map(int, match[2].split()))), int(match[1]))

    @property
    def split(self) -> Split:
        """The split that the problem belongs to, by its content: about one problem in ten is for testing."""
        digest = hashlib.sha256(self.text.encode()).digest()
        return "test" if digest[0] < 26 else "train"


def legal_steps(numbers: Sequence[int]) -> list[Step]:
    """Every operation on two of the numbers with a result from 1 to 99, in a fixed order.

    Multiplying or dividing by one is left out: all that it does is use up the one.
    """
    steps: dict[Step, None] = {}
    for i, a in enumerate(numbers):
        for b in numbers[i + 1 :]:
            low, high = min(a, b), max(a, b)
            if low + high <= LARGEST_INTERMEDIATE:
                steps[Step(low, "+", high, low + high)] = None
            if high > low:
                steps[Step(high, "-", low, high - low)] = None
            if low > 1 and low * high <= LARGEST_INTERMEDIATE:
                steps[Step(low, "*", high, low * high)] = None
            if low > 1 and high % low == 0:
                steps[Step(high, "/", low, high // low)] = None
    return list(steps)


def numbers_after(numbers: Sequence[int], step: Step) -> tuple[int, ...]:
    """The numbers that remain after a step, in ascending order."""
    left = list(numbers)
    left.remove(step.a)
    left.remove(step.b)
    return tuple(sorted([*left, step.result]))


def parse_steps(text: str) -> list[Step] | None:
    """The steps of a solution such as ' 3+ 7= 10, 8+ 10= 18'; None for any other text."""
    matches = [STEP.fullmatch(part) for part in text.split(",")]
    return [Step(int(m[1]), m[2], int(m[3]), int(m[4])) for m in matches if m] if all(matches) else None


def solves(problem: Problem, text: str) -> bool:
    """Whether a text is a solution: correct steps that use up all numbers and end at the target.

    White space around the text does not matter.

    Examples:
        >>> solves(Problem((3, 7, 8), 18), " 3+ 7= 10, 8+ 10= 18")
        True
    """
    taken = parse_steps(" " + text.strip())
    left = problem.numbers
    for step in taken or ():
        if not step.is_correct or Counter([step.a, step.b]) - Counter(left):
            return False
        left = numbers_after(left, step)
    return left == (problem.target,)


@lru_cache(maxsize=1 << 18)
def _count_solutions(numbers: tuple[int, ...], target: int) -> int:
    if len(numbers) == 1:
        return int(numbers[0] == target)
    return sum(_count_solutions(numbers_after(numbers, step), target) for step in legal_steps(numbers))


def count_solutions(problem: Problem) -> int:
    """In how many ways, as sequences of steps, a problem can be solved: the fewer, the harder."""
    return _count_solutions(problem.numbers, problem.target)


def two_number_problems(split: Split) -> list[Problem]:
    """All problems of two numbers in a split, in a fixed order."""
    all_pairs = [(a, b) for a in range(1, LARGEST_NUMBER + 1) for b in range(a, LARGEST_NUMBER + 1)]
    reached = [(pair, step.result) for pair in all_pairs for step in legal_steps(pair)]
    unique = dict.fromkeys(Problem(pair, n) for pair, n in reached if TARGET_RANGE[0] <= n <= TARGET_RANGE[1])
    return [problem for problem in unique if problem.split == split]


def generate_problems(
    count: int,
    split: Split,
    *,
    seed: int = 0,
    numbers: Sequence[int] = (3, 4, 4, 4),
    solvable: bool = True,
) -> Iterator[Problem]:
    """Different random problems with 1 to `MAX_SOLUTIONS` solutions, or with none, the same for the same arguments.

    Problems of six numbers have up to `MAX_SOLUTIONS_OF_SIX`, and hardly any has none.

    Args:
        count: How many.
        split: The split that they belong to.
        seed: Seed of the problems.
        numbers: How many numbers a problem has; problems take these in turn.
        solvable: Whether they have a solution.

    Raises:
        AprError: If hardly any further problem can be found, or a problem of six numbers is to have no solution.
    """
    if max(numbers, default=0) > 5 and not solvable:
        raise AprError("hardly any problem of six numbers has no solution, expected at most five")
    name = "countdown" if solvable else "unsolvable countdown"
    rng, seen, tries = random.Random(f"{name} {split} {seed}"), set[Problem](), 0
    while len(seen) < count:
        tries += 1
        if tries > MAX_TRIES:
            raise AprError(f"expected at most about {len(seen)} problems with {sorted(set(numbers))} numbers")
        size = numbers[len(seen) % len(numbers)]
        min_solutions, max_solutions = (
            (1, MAX_SOLUTIONS if size < 6 else MAX_SOLUTIONS_OF_SIX) if solvable else (0, 0)
        )
        drawn = tuple(sorted(rng.randint(1, LARGEST_NUMBER) for _ in range(size)))
        problem = Problem(drawn, rng.randint(*TARGET_RANGE))
        if (
            problem in seen
            or problem.split != split
            or not (min_solutions <= count_solutions(problem) <= max_solutions)
        ):
            continue
        seen.add(problem)
        tries = 0
        yield problem
