"""The symbolic search as a model that an engine is asked for: it makes trajectories to learn from; it learns nothing."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sgl_apr.engine.base import Request
from sgl_apr.engine.scripted import ScriptedEngine
from sgl_apr.evaluation.tasks.countdown.problems import (
    Problem,
    Step,
    count_solutions,
    legal_steps,
    numbers_after,
    parse_steps,
)
from sgl_apr.evaluation.tasks.countdown.search import (
    CONCLUSION_TOKENS,
    NO_SOLUTION_MARK,
    conclusion,
    search_small,
    sequential_search,
)
from sgl_apr.formats.dialects import Dialect, dialect
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.loop import areason
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory

BRANCH_TOKENS = 43  # tokens of the longest message and its result, tags included
MESSAGE_MARK = ">"  # what a message begins with


@dataclass(frozen=True, slots=True)
class SearchStyle:
    """How the search goes about it; what it does by chance is for a model to find better ways in.

    window: tokens that one context may have. forks: how often it forks, by how many numbers there are.
    width: the fewest and the most branches of a fork. again: how often it forks once more where all of
    them have failed. lucky: how often the first fork has a step among its few that leads to a solution.
    """

    window: int = 512
    forks: Mapping[int, float] = field(default_factory=lambda: {3: 0.1, 4: 0.9})
    width: tuple[int, int] = (2, 8)
    revisit_rate: float = 0.8
    hint_rate: float = 0.0


class Expert:
    """Answers the requests of one trajectory, in a dialect whose branches get a message."""

    def __init__(self, problem: Problem, rng: random.Random, habits: SearchStyle, to: Dialect) -> None:
        self.problem, self.rng, self.habits, self.to = problem, rng, habits, to
        self.left: list[Step] = []  # first steps not tried yet, the next at the end
        self.tried: list[Step] = []

    def __call__(self, request: Request, prompt: str) -> str:
        if not prompt.startswith(self.problem.text):
            return self.branch(prompt)
        if self.left or self.tried:
            return self.after_join(len(request.input_ids))
        if self.rng.random() >= self.habits.forks.get(len(self.problem.numbers), 0):
            return sequential_search(self.problem, self.habits.window)
        self.left = legal_steps(self.problem.numbers)[::-1]
        if self.rng.random() < self.habits.hint_rate:
            self.left = self.hinted_steps()
        return self.fork(self.affordable_branches(len(request.input_ids)))

    def hinted_steps(self) -> list[Step]:
        """Some of the first steps, one that leads to a solution among them if there is one, in their order."""
        every, most = self.left, self.rng.randint(*self.habits.width)
        leading = [
            s
            for s in every
            if count_solutions(Problem(numbers_after(self.problem.numbers, s), self.problem.target))
        ]
        chosen = {
            *self.rng.sample(leading, min(1, len(leading))),
            *self.rng.sample(every, min(most - 1, len(every))),
        }
        return [step for step in every if step in chosen]

    def affordable_branches(self, context: int) -> int:
        """How many branches the window has room for."""
        return (self.habits.window - context - CONCLUSION_TOKENS) // BRANCH_TOKENS

    def fork(self, room: int) -> str:
        width = min(self.rng.randint(*self.habits.width), len(self.left), room)
        self.tried = [self.left.pop() for _ in range(width)]
        messages = [self.message(step) for step in self.tried]
        first = self.to.first_number
        return self.to.grammar.render_rule("fork", each=[(f"{first + k}", m) for k, m in enumerate(messages)])

    def message(self, step: Step) -> str:
        """What a branch is told: a first step, and the problem of one number less that it leads to.

        A message loses white space around it, and a number without the space before it is another token.
        """
        left = Problem(numbers_after(self.problem.numbers, step), self.problem.target)
        return f"{MESSAGE_MARK}{step.text};{left.text}"

    def branch(self, prompt: str) -> str:
        told, _, rest = prompt.removeprefix(MESSAGE_MARK).partition(";")
        given = Problem.parse(rest)
        found = search_small(given.numbers, given.target)
        if found.solution is None:  # and which step it was: who forked it does not see its message any more
            said = NO_SOLUTION_MARK + told.partition("=")[0]
        else:
            said = conclusion([*(parse_steps(told) or []), *found.solution])
        return f"\n{found.text}{self.to.grammar.render_rule('closer', text=said)}"

    def after_join(self, context: int) -> str:
        """The first solution that came back, another fork, or none."""
        for step in self.tried:
            found = search_small(numbers_after(self.problem.numbers, step), self.problem.target)
            if found.solution is not None:
                return conclusion([step, *found.solution])
        room = (
            self.affordable_branches(context)
            if self.left and self.rng.random() < self.habits.revisit_rate
            else 0
        )
        return self.fork(room) if room > 0 else conclusion(None)


async def demonstration(
    problem: Problem,
    tokenizer: Tokenizer,
    *,
    seed: int,
    style: SearchStyle | None = None,
    target_dialect: Dialect | str = "spawn",
    state_width: bool = False,
) -> Trajectory:
    """A trajectory of the search of a problem, just as the loop records it.

    `state_width`: all of its forks have one width, drawn from those of its habits, which the prompt says.
    """
    target = dialect(target_dialect) if isinstance(target_dialect, str) else target_dialect
    rng, style, stated = random.Random(f"{seed} {problem.text}"), style or SearchStyle(), None
    if state_width:
        stated = rng.randint(*style.width)
        style = replace(style, width=(stated, stated))
    engine = ScriptedEngine(Expert(problem, rng, style, target), tokenizer)
    budget = Budget(tokens=1 << 20)
    return await areason(engine, problem.prompt(stated), target, budget=budget, pacing=None)
