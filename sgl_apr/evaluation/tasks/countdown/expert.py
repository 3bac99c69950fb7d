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
    SearchTrace,
    search_sequentially,
    sequential_search,
)
from sgl_apr.formats.dialects import Dialect

STATE_MARK = ">"  # before a first step and the problem that it leaves
SMALL = 3  # numbers of a problem that a branch searches completely, without a fork


@dataclass(frozen=True, slots=True)
class SearchStyle:
    """How the expert searches; what it decides at random, a trained model can decide better.

    Attributes:
        window: Tokens of the longest context.
        forks: Probability of a fork, by how many numbers the problem has.
        width: Smallest and largest number of branches of a fork.
        revisit_rate: Probability of another fork after one whose branches all failed.
        hint_rate: Probability that the first fork has few branches, one of them with a step that leads to a solution.
        depth: How deep forks nest. Only problems of more than four numbers need more than one level.
    """

    window: int = 512
    forks: Mapping[int, float] = field(default_factory=lambda: {3: 0.1, 4: 0.9})
    width: tuple[int, int] = (2, 8)
    revisit_rate: float = 0.8
    hint_rate: float = 0.0
    depth: int = 1


@dataclass(slots=True)
class ExpertNode:
    """What one sequence searches.

    Attributes:
        problem: The problem that is left for it.
        step: The step that leads to it from the problem of its parent; None for the trunk.
        depth: How deep it is nested.
        untried: First steps, the next at the end.
        children: The branches of its last fork.
        forks: How many forks it has written.
        solution: The steps from `step` on that reach the target, once they are found.
    """

    problem: Problem
    step: Step | None = None
    depth: int = 0
    untried: list[Step] = field(default_factory=list)
    children: list[ExpertNode] = field(default_factory=list)
    forks: int = 0
    solution: list[Step] | None = None

    def child(self, step: Step) -> ExpertNode:
        """The node that a step leads to."""
        left = Problem(numbers_after(self.problem.numbers, step), self.problem.target)
        return ExpertNode(left, step, self.depth + 1)

    def solve(self, steps: list[Step]) -> list[Step]:
        """Note the steps that solve the problem of the node."""
        self.solution = [*([self.step] if self.step else []), *steps]
        return self.solution


class Expert(ABC):
    """Answers the requests of one trajectory. A subclass writes the branches of one kind of dialect.

    Args:
        problem: What is searched.
        rng: The random choices.
        style: How it searches.
        dialect: The format of the reply.
    """

    branch_tokens: int
    """Tokens that a branch without forks adds to the context of its parent at most, tags included."""

    def __init__(self, problem: Problem, rng: random.Random, style: SearchStyle, dialect: Dialect) -> None:
        self.problem, self.rng, self.style, self.dialect = problem, rng, style, dialect
        self.trunk = ExpertNode(problem)

    def __call__(self, request: Request, prompt: str) -> str:
        node = self.locate(prompt)
        if node.forks:
            return self.after_join(node, self.affordable_branches(node, len(request.input_ids)))
        if node.depth and not self.nests(node):
            return self.write_branch(node)
        smallest = max(1, self.dialect.min_width)
        room = max(
            self.affordable_branches(node, len(request.input_ids)), self.dialect.min_width * bool(node.depth)
        )
        if self.rng.random() >= self.style.forks.get(len(node.problem.numbers), 0) or room < smallest:
            return (
                sequential_search(self.problem, self.style.window)
                if node is self.trunk
                else self.write_branch(node)
            )
        node.untried = legal_steps(node.problem.numbers)[::-1]
        if self.rng.random() < self.style.hint_rate:
            node.untried = self.hinted_steps(node)
        return self.introduction(node) + self.fork(node, room)

    @abstractmethod
    def locate(self, prompt: str) -> ExpertNode:
        """The node of the sequence that a request belongs to."""

    @abstractmethod
    def write_branch(self, node: ExpertNode) -> str:
        """What a branch decodes that does not fork."""

    @abstractmethod
    def fork(self, node: ExpertNode, room: int) -> str:
        """A fork into at most `room` branches."""

    @abstractmethod
    def conclude(self, node: ExpertNode) -> str:
        """What ends a sequence that has forked."""

    def introduction(self, node: ExpertNode) -> str:
        """What a sequence writes before its first fork."""
        return ""

    def close(self, index: int | None) -> str:
        """What a sequence writes to close a block, given the index of the first branch with a solution."""
        return ""

    def nests(self, node: ExpertNode) -> bool:
        """Whether a branch may fork."""
        return len(node.problem.numbers) > SMALL and node.depth < min(
            self.style.depth, self.dialect.max_depth
        )

    def hinted_steps(self, node: ExpertNode) -> list[Step]:
        """A few first steps, in order; one of them leads to a solution, if any does."""
        every, width = node.untried, self.rng.randint(*self.style.width)
        leading = [s for s in every if count_solutions(node.child(s).problem)]
        chosen = {
            *self.rng.sample(leading, min(1, len(leading))),
            *self.rng.sample(every, min(width - 1, len(every))),
        }
        return [step for step in every if step in chosen]

    def affordable_branches(self, node: ExpertNode, context: int) -> int:
        """How many branches still fit into the window. A branch that forks itself counts as its widest fork."""
        levels = min(self.style.depth - node.depth, len(node.problem.numbers) - SMALL)
        cost: int = self.branch_tokens * self.style.width[1] ** max(0, levels - 1)
        return (self.style.window - context - CONCLUSION_TOKENS) // cost

    def take_steps(self, node: ExpertNode, room: int) -> list[ExpertNode]:
        """The branches of the next fork, of a random width."""
        width = min(self.rng.randint(*self.style.width), self.dialect.max_width, len(node.untried), room)
        node.children = [node.child(node.untried.pop()) for _ in range(width)]
        node.forks += 1
        return node.children

    def render_fork(self, node: ExpertNode, outlines: list[str]) -> str:
        """A fork with an outline for each branch."""
        return self.dialect.grammar.render_rule(
            "fork", each=[(self.number(node, k), text) for k, text in enumerate(outlines)]
        )

    def number(self, node: ExpertNode, index: int) -> str:
        """The number of a branch of a node."""
        return str(self.dialect.first_number + index)

    def first_solution(self, node: ExpertNode) -> tuple[int, list[Step]] | None:
        """The index of the first branch of the last fork with a solution, and that solution."""
        for index, child in enumerate(node.children):
            if solution := child.solution if child.forks else self.search(child).solution:
                return index, [*solution] if child.forks else [*filter(None, [child.step]), *solution]
        return None

    def search(self, node: ExpertNode) -> SearchTrace:
        """The search of a branch that does not fork."""
        return search_sequentially(node.problem, self.style.window // 2)

    def after_join(self, node: ExpertNode, room: int) -> str:
        """The first solution that a branch found; or else another fork, or no solution."""
        if found := self.first_solution(node):
            node.solve(found[1])
            return self.close(found[0]) + self.conclude(node)
        smallest = self.dialect.min_width
        may_fork = min(len(node.untried), room) >= smallest and self.rng.random() < self.style.revisit_rate
        return self.close(None) + (self.fork(node, room) if may_fork else self.conclude(node))
