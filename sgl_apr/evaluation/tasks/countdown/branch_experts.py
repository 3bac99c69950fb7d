"""How the symbolic Countdown search writes its branches: after a message, behind an outline, or without either."""

from __future__ import annotations

import random
from functools import cached_property

from sgl_apr.errors import AprError
from sgl_apr.evaluation.tasks.countdown.expert import STATE_MARK, Expert, SearchStyle
from sgl_apr.evaluation.tasks.countdown.problems import (
    Problem,
    Step,
    legal_steps,
    numbers_after,
    parse_steps,
)
from sgl_apr.evaluation.tasks.countdown.search import (
    NO_SOLUTION_MARK,
    SOLUTION_MARK,
    SearchTrace,
    conclusion,
    search_small,
)
from sgl_apr.formats.dialects import Dialect

TAUGHT = ("threadweaver", "multiverse", "npr", "parallel_r1", "parathinker", "spawn")
PATH_STEPS = 3  # first steps that one path without an outline tries


class MessageExpert(Expert):
    """Branches get a message and return one (spawn)."""

    branch_tokens = 43  # of the longest message and its result

    def is_branch(self, prompt: str) -> bool:
        return not prompt.startswith(self.problem.text)

    def fork(self, room: int) -> str:
        return self.render_fork([self.message(step) for step in self.take_steps(room)])

    def message(self, step: Step) -> str:
        """The message of a branch: a first step, and the problem that it leaves.

        A message loses the white space around it, and a number without a space before it is another token. So the message
        starts with a mark.
        """
        left = Problem(numbers_after(self.problem.numbers, step), self.problem.target)
        return f"{STATE_MARK}{step.text};{left.text}"

    def branch(self, prompt: str) -> str:
        step, _, rest = prompt.removeprefix(STATE_MARK).partition(";")
        problem = Problem.parse(rest)
        trace = search_small(problem.numbers, problem.target)
        if trace.solution is None:  # names its step, since the parent no longer sees the message
            result = NO_SOLUTION_MARK + step.partition("=")[0]
        else:
            result = conclusion([*(parse_steps(step) or []), *trace.solution])
        return f"\n{trace.text}{self.dialect.grammar.render_rule('closer', text=result)}"


class SharedPrefixExpert(Expert):
    """Branches see the text before the fork, and the trunk sees theirs after the join."""

    branch_tokens = 150  # of the longest branch and its outline

    @cached_property
    def headers(self) -> dict[str, int]:
        """The texts that the runtime writes before a branch, with the index of the branch."""
        first, grammar = self.dialect.first_number, self.dialect.grammar
        numbers = range(first, first + self.dialect.max_width)
        return {grammar.render_rule("header", str(n)): n - first for n in reversed(numbers)}

    def index(self, prompt: str) -> int | None:
        """The index of the branch that a request belongs to."""
        return next((k for text, k in self.headers.items() if prompt.endswith(text)), None)

    def is_branch(self, prompt: str) -> bool:
        return self.index(prompt) is not None

    def number(self, index: int) -> str:
        """The number of a branch."""
        return str(self.dialect.first_number + index)

    def closer(self, index: int) -> str:
        """The tag that ends a branch."""
        return self.dialect.grammar.closing_literal("body", self.number(index))

    def search(self, step: Step) -> tuple[str, SearchTrace]:
        """The search behind a first step: the step with the problem that it leaves, as in a message, and all that follows."""
        left = Problem(numbers_after(self.problem.numbers, step), self.problem.target)
        trace = search_small(left.numbers, left.target)
        return f"{STATE_MARK}{step.text};{left.text}\n{trace.text}", trace


class OutlineExpert(SharedPrefixExpert):
    """Each branch has an outline: its first step (threadweaver, multiverse, npr)."""

    def fork(self, room: int) -> str:
        return self.render_fork([step.text for step in self.take_steps(room)])

    def branch(self, prompt: str) -> str:
        index = self.index(prompt)
        assert index is not None
        step = self.last_fork[index]
        text, trace = self.search(step)
        found = None if trace.solution is None else [step, *trace.solution]
        return text + conclusion(found) + self.closer(index)

    def close(self, index: int | None) -> str:
        """The number of the branch with a solution stands in the conclusion that a format requires."""
        return close_block(self.dialect, NO_SOLUTION_MARK if index is None else f" {self.number(index)}")


class PathExpert(SharedPrefixExpert):
    """Branches have no outlines, and differ by their number or only by sampling (parathinker, parallel_r1).

    A path tries up to `PATH_STEPS` first steps. Numbered paths divide them: each takes every `max_width`-th, beginning at its
    own number. Other paths draw them at random from those that no earlier block has tried.
    """

    branch_tokens = PATH_STEPS * 130

    def __init__(self, problem: Problem, rng: random.Random, style: SearchStyle, dialect: Dialect) -> None:
        super().__init__(problem, rng, style, dialect)
        self.is_numbered = "trunk" not in dialect.grammar.rules  # every reply begins with its paths
        self.solutions: list[list[Step] | None] = []  # of the paths of this block
        if self.is_numbered:
            self.untried = legal_steps(problem.numbers)

    @property
    def has_forked(self) -> bool:
        return bool(self.solutions)

    def fork(self, room: int) -> str:
        self.untried = [step for step in self.untried if step not in self.last_fork]
        self.last_fork, self.solutions = [], []
        return self.dialect.grammar.render_rule("fork")

    def branch(self, prompt: str) -> str:
        index = self.index(prompt)
        assert index is not None
        if self.is_numbered:
            steps = self.untried[index :: self.dialect.max_width][:PATH_STEPS]
        else:
            steps = self.rng.sample(self.untried, min(PATH_STEPS, len(self.untried)))
        self.last_fork += steps
        text, found = "", None
        for step in steps:
            part, trace = self.search(step)
            text += part
            if trace.solution is not None:
                found = [step, *trace.solution]
                break
        self.solutions.append(found)
        return text + conclusion(found) + self.closer(index)

    def found(self) -> tuple[int, list[Step]] | None:
        return next(((k, steps) for k, steps in enumerate(self.solutions) if steps), None)

    def after_join(self, room: int) -> str:
        if not self.is_numbered:
            self.untried = [step for step in self.untried if step not in self.last_fork]
            return super().after_join(room)
        found = self.found()
        return conclusion(found and found[1])

    def close(self, index: int | None) -> str:
        return close_block(self.dialect, NO_SOLUTION_MARK if index is None else SOLUTION_MARK)


def close_block(dialect: Dialect, text: str) -> str:
    """What the trunk writes to close a block: `text`, if the format requires a conclusion, and the closing tags."""
    grammar = dialect.grammar
    is_optional = "conclusion" in grammar.rules
    return grammar.closing_literal("close") if is_optional else grammar.render_rule("close", text=text)


def expert_for(problem: Problem, rng: random.Random, style: SearchStyle, dialect: Dialect) -> Expert:
    """The expert that writes branches as a dialect has them.

    Raises:
        AprError: There is none for this dialect.
    """
    by_message = dialect.branch_context == "message"
    if dialect.asynchronous or (by_message and "closer" not in dialect.grammar.rules):
        raise AprError(f"no demonstrations of Countdown in {dialect.name}, expected {', '.join(TAUGHT)}")
    if by_message:
        return MessageExpert(problem, rng, style, dialect)
    kind = (
        PathExpert if dialect.unlabelled_branches or "trunk" not in dialect.grammar.rules else OutlineExpert
    )
    return kind(problem, rng, style, dialect)
