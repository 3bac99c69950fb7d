"""The symbolic Countdown search as a scripted model, whose trajectories are demonstrations to learn from."""

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

BRANCH_TOKENS = 43  # of the longest message and its result, tags included
MESSAGE_MARK = ">"  # starts a message


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


class Expert:
    """Answers the requests of one trajectory, in a dialect whose branches get a message."""

    def __init__(self, problem: Problem, rng: random.Random, style: SearchStyle, dialect: Dialect) -> None:
        self.problem, self.rng, self.style, self.dialect = problem, rng, style, dialect
        self.untried: list[Step] = []  # first steps, the next at the end
        self.last_fork: list[Step] = []  # first steps of the branches of the last fork

    def __call__(self, request: Request, prompt: str) -> str:
        if not prompt.startswith(self.problem.text):
            return self.branch(prompt)
        if self.untried or self.last_fork:
            return self.after_join(len(request.input_ids))
        if self.rng.random() >= self.style.forks.get(len(self.problem.numbers), 0):
            return sequential_search(self.problem, self.style.window)
        self.untried = legal_steps(self.problem.numbers)[::-1]
        if self.rng.random() < self.style.hint_rate:
            self.untried = self.hinted_steps()
        return self.fork(self.affordable_branches(len(request.input_ids)))

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
        return (self.style.window - context - CONCLUSION_TOKENS) // BRANCH_TOKENS

    def fork(self, room: int) -> str:
        width = min(self.rng.randint(*self.style.width), len(self.untried), room)
        self.last_fork = [self.untried.pop() for _ in range(width)]
        messages = [self.message(step) for step in self.last_fork]
        first = self.dialect.first_number
        return self.dialect.grammar.render_rule(
            "fork", each=[(f"{first + k}", m) for k, m in enumerate(messages)]
        )

    def message(self, step: Step) -> str:
        """The message of a branch: a first step, and the problem that it leaves.

        A message loses the white space around it, and a number without a space before it is another token. So the message
        starts with a mark.
        """
        left = Problem(numbers_after(self.problem.numbers, step), self.problem.target)
        return f"{MESSAGE_MARK}{step.text};{left.text}"

    def branch(self, prompt: str) -> str:
        step, _, rest = prompt.removeprefix(MESSAGE_MARK).partition(";")
        problem = Problem.parse(rest)
        trace = search_small(problem.numbers, problem.target)
        if trace.solution is None:  # names its step, since the parent no longer sees the message
            result = NO_SOLUTION_MARK + step.partition("=")[0]
        else:
            result = conclusion([*(parse_steps(step) or []), *trace.solution])
        return f"\n{trace.text}{self.dialect.grammar.render_rule('closer', text=result)}"

    def after_join(self, context: int) -> str:
        """The first solution that a branch returned; or else another fork, or no solution."""
        for step in self.last_fork:
            trace = search_small(numbers_after(self.problem.numbers, step), self.problem.target)
            if trace.solution is not None:
                return conclusion([step, *trace.solution])
        room = (
            self.affordable_branches(context)
            if self.untried and self.rng.random() < self.style.revisit_rate
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
    """The trajectory of the expert's search of a problem, recorded by the loop.

    Args:
        problem: The problem.
        tokenizer: Tokenizes the text.
        seed: Seed of the random choices.
        style: How the expert searches.
        target_dialect: A dialect whose branches get a message.
        state_width: Give all forks of the trajectory one width, drawn from the style's, and state it in the prompt.
    """
    target = dialect(target_dialect) if isinstance(target_dialect, str) else target_dialect
    rng, style, stated = random.Random(f"{seed} {problem.text}"), style or SearchStyle(), None
    if state_width:
        stated = rng.randint(*style.width)
        style = replace(style, width=(stated, stated))
    engine = ScriptedEngine(Expert(problem, rng, style, target), tokenizer)
    budget = Budget(tokens=1 << 20)
    return await areason(engine, problem.prompt(stated), target, budget=budget, pacing=None)
