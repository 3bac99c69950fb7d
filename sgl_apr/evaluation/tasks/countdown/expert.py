"""The symbolic Countdown search as a scripted model: when it forks, which first steps it tries, and what it concludes."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from sgl_apr.engine.base import Request
from sgl_apr.evaluation.tasks.countdown.problems import (
    Problem,
    Step,
    count_solutions,
    legal_steps,
    numbers_after,
)
from sgl_apr.evaluation.tasks.countdown.search import (
    CONCLUSION_TOKENS,
    conclusion,
    search_small,
    sequential_search,
)
from sgl_apr.formats.dialects import Dialect

STATE_MARK = ">"  # before a first step and the problem that it leaves


@dataclass(frozen=True, slots=True)
class SearchStyle:
    """How the expert searches; what it decides at random, a trained model can decide better.

    Attributes:
        window: Tokens of the longest context.
        forks: Probability of a fork, by how many numbers the problem has.
        width: Smallest and largest number of branches of a fork.
        revisit_rate: Probability of another fork after one whose branches all failed.
        hint_rate: Probability that the first fork has few branches, one of them with a step that leads to a solution.
    """

    window: int = 512
    forks: Mapping[int, float] = field(default_factory=lambda: {3: 0.1, 4: 0.9})
    width: tuple[int, int] = (2, 8)
    revisit_rate: float = 0.8
    hint_rate: float = 0.0


class Expert(ABC):
    """Answers the requests of one trajectory. A subclass writes the branches of one kind of dialect.

    Args:
        problem: What is searched.
        rng: The random choices.
        style: How it searches.
        dialect: The format of the reply.
    """

    branch_tokens: int
    """Tokens that a branch adds to the context of the trunk at most, tags included."""

    def __init__(self, problem: Problem, rng: random.Random, style: SearchStyle, dialect: Dialect) -> None:
        self.problem, self.rng, self.style, self.dialect = problem, rng, style, dialect
        self.untried: list[Step] = []  # first steps, the next at the end
        self.last_fork: list[Step] = []  # first steps of the branches of the last fork

    def __call__(self, request: Request, prompt: str) -> str:
        if self.is_branch(prompt):
            return self.branch(prompt)
        context = len(request.input_ids)
        if self.has_forked:
            return self.after_join(self.affordable_branches(context))
        if self.rng.random() >= self.style.forks.get(len(self.problem.numbers), 0):
            return sequential_search(self.problem, self.style.window)
        self.untried = legal_steps(self.problem.numbers)[::-1]
        if self.rng.random() < self.style.hint_rate:
            self.untried = self.hinted_steps()
        return self.fork(self.affordable_branches(context))

    @property
    def has_forked(self) -> bool:
        """Whether the trunk stands behind a join."""
        return bool(self.last_fork)

    @abstractmethod
    def is_branch(self, prompt: str) -> bool:
        """Whether a request belongs to a branch."""

    @abstractmethod
    def branch(self, prompt: str) -> str:
        """What a branch decodes."""

    @abstractmethod
    def fork(self, room: int) -> str:
        """A fork into at most `room` branches, whose first steps are then the last fork's."""

    def close(self, index: int | None) -> str:
        """What the trunk writes to close a block, given the index of the first branch with a solution."""
        return ""

    def hinted_steps(self) -> list[Step]:
        """A few first steps, in order; one of them leads to a solution, if any does."""
        every, width = self.untried, self.rng.randint(*self.style.width)
        leading = [
            s
            for s in every
            if count_solutions(Problem(numbers_after(self.problem.numbers, s), self.problem.target))
        ]
        chosen = {
            *self.rng.sample(leading, min(1, len(leading))),
            *self.rng.sample(every, min(width - 1, len(every))),
        }
        return [step for step in every if step in chosen]

    def affordable_branches(self, context: int) -> int:
        """How many branches still fit into the window."""
        return (self.style.window - context - CONCLUSION_TOKENS) // self.branch_tokens

    def take_steps(self, room: int) -> list[Step]:
        """The first steps of the next fork, of a random width."""
        width = min(self.rng.randint(*self.style.width), self.dialect.max_width, len(self.untried), room)
        self.last_fork = [self.untried.pop() for _ in range(width)]
        return self.last_fork

    def render_fork(self, outlines: list[str]) -> str:
        """A fork with an outline for each branch."""
        first = self.dialect.first_number
        return self.dialect.grammar.render_rule(
            "fork", each=[(f"{first + k}", text) for k, text in enumerate(outlines)]
        )

    def found(self) -> tuple[int, list[Step]] | None:
        """The index of the first branch of the last fork with a solution, and that solution."""
        for index, step in enumerate(self.last_fork):
            trace = search_small(numbers_after(self.problem.numbers, step), self.problem.target)
            if trace.solution is not None:
                return index, [step, *trace.solution]
        return None

    def after_join(self, room: int) -> str:
        """The first solution that a branch found; or else another fork, or no solution."""
        if found := self.found():
            return self.close(found[0]) + conclusion(found[1])
        smallest = self.dialect.min_width
        may_fork = min(len(self.untried), room) >= smallest and self.rng.random() < self.style.revisit_rate
        return self.close(None) + (self.fork(room) if may_fork else conclusion(None))
