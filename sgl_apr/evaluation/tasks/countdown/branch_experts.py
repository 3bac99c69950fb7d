"""How the symbolic Countdown search writes its branches: after a message, after an outline, or without either."""

from __future__ import annotations

import random
import re
from functools import cached_property

from sgl_apr.engine.base import Request
from sgl_apr.errors import AprError
from sgl_apr.evaluation.tasks.countdown.expert import STATE_MARK, Expert, ExpertNode, SearchStyle
from sgl_apr.evaluation.tasks.countdown.problems import Problem, Step, legal_steps
from sgl_apr.evaluation.tasks.countdown.search import (
    CONCLUSION_TOKENS,
    NO_SOLUTION_MARK,
    SOLUTION_MARK,
    conclusion,
)
from sgl_apr.formats.dialects import Dialect

TAUGHT = ("threadweaver", "multiverse", "npr", "parallel_r1", "parathinker", "spawn")
PATH_STEPS = 3  # first steps that one path without an outline tries


def state_text(node: ExpertNode) -> str:
    """A first step, and the problem that it leaves.

    A message loses the white space around it, and a number without a space before it is another token. So the text starts
    with a mark.
    """
    assert node.step
    return f"{STATE_MARK}{node.step.text};{node.problem.text}"


class MessageExpert(Expert):
    """Branches get a message and return one (spawn)."""

    branch_tokens = 43  # of the longest message and its result

    def __init__(self, problem: Problem, rng: random.Random, style: SearchStyle, dialect: Dialect) -> None:
        super().__init__(problem, rng, style, dialect)
        self.by_message: dict[str, ExpertNode] = {}

    def locate(self, prompt: str) -> ExpertNode:
        if prompt.startswith(self.problem.text):
            return self.trunk
        message = max((text for text in self.by_message if prompt.startswith(text)), key=len)
        return self.by_message[message]

    def affordable_branches(self, node: ExpertNode, context: int) -> int:
        return (self.style.window - context - CONCLUSION_TOKENS) // self.branch_tokens

    def fork(self, node: ExpertNode, room: int) -> str:
        children = self.take_steps(node, room)
        self.by_message |= {state_text(child): child for child in children}
        return self.render_fork(node, [state_text(child) for child in children])

    def write_branch(self, node: ExpertNode) -> str:
        trace = self.search(node)
        if trace.solution is not None:
            node.solve([*trace.solution])
        return f"\n{trace.text}{self.conclude(node)}"

    def conclude(self, node: ExpertNode) -> str:
        if node is self.trunk:
            return conclusion(node.solution)
        assert node.step
        # Without a solution it names its step, since the parent no longer sees the message.
        failed = NO_SOLUTION_MARK + node.step.text.partition("=")[0]
        return self.dialect.grammar.render_rule(
            "closer", text=conclusion(node.solution) if node.solution else failed
        )


class SharedPrefixExpert(Expert):
    """Branches see the text before the fork, and the trunk sees theirs after the join."""

    branch_tokens = 150  # of the longest branch and its outline

    @cached_property
    def tags(self) -> re.Pattern[str]:
        """What begins a branch, with its number if it has one, and what ends it."""
        grammar, number = self.dialect.grammar, r"([1-9][0-9.]*)"
        header = re.escape(grammar.render_rule("header", "@")).replace("@", number)
        closer = re.escape(grammar.closing_literal("body", "@")).replace("@", r"[1-9][0-9.]*")
        return re.compile(f"(?P<header>{header})|(?P<closer>{closer})")

    def closer(self, number: str) -> str:
        """The tag that ends a branch."""
        return self.dialect.grammar.closing_literal("body", number)

    def close(self, index: int | None) -> str:
        return close_block(self.dialect, NO_SOLUTION_MARK if index is None else SOLUTION_MARK)

    def searched(self, node: ExpertNode) -> str:
        """The search after a first step: the step with the problem that it leaves, as in a message, and all that follows."""
        trace = self.search(node)
        if trace.solution is not None:
            node.solve([*trace.solution])
        return f"{state_text(node)}\n{trace.text}"


class OutlineExpert(SharedPrefixExpert):
    """Each branch has an outline: its first step (threadweaver, multiverse, npr)."""

    def __init__(self, problem: Problem, rng: random.Random, style: SearchStyle, dialect: Dialect) -> None:
        super().__init__(problem, rng, style, dialect)
        self.numbers = {id(self.trunk): ""}

    def locate(self, prompt: str) -> ExpertNode:
        opened: list[str] = []
        for tag in self.tags.finditer(prompt):
            if tag["header"]:
                opened.append(tag[2])
            else:
                opened.pop()
        node = self.trunk
        for number in opened:
            node = node.children[int(number.rpartition(".")[2]) - self.dialect.first_number]
        return node

    def number(self, node: ExpertNode, index: int) -> str:
        prefix = self.numbers[id(node)] if self.dialect.nested_numbering else ""
        return f"{prefix}{'.' * bool(prefix)}{super().number(node, index)}"

    def fork(self, node: ExpertNode, room: int) -> str:
        children = self.take_steps(node, room)
        self.numbers |= {id(child): self.number(node, k) for k, child in enumerate(children)}
        return self.render_fork(node, [child.step.text for child in children if child.step])

    def introduction(self, node: ExpertNode) -> str:
        return state_text(node) + "\n" if node.depth else ""

    def write_branch(self, node: ExpertNode) -> str:
        return self.searched(node) + self.conclude(node)

    def conclude(self, node: ExpertNode) -> str:
        closer = self.closer(self.numbers[id(node)]) if node.depth else ""
        return conclusion(node.solution) + closer

    def close(self, index: int | None) -> str:
        """The number of the branch with a solution stands in the conclusion that a format requires."""
        text = NO_SOLUTION_MARK if index is None else f" {self.dialect.first_number + index}"
        return close_block(self.dialect, text)


class PathExpert(SharedPrefixExpert):
    """Branches have no outlines, and differ by their number or only by sampling (parathinker, parallel_r1).

    A path tries up to `PATH_STEPS` first steps. Numbered paths divide them: each takes every `max_width`-th, beginning at its
    own number. Other paths draw them at random from those that no earlier block has tried.
    """

    branch_tokens = PATH_STEPS * 130

    def __init__(self, problem: Problem, rng: random.Random, style: SearchStyle, dialect: Dialect) -> None:
        super().__init__(problem, rng, style, dialect)
        self.is_numbered = "trunk" not in dialect.grammar.rules  # every reply begins with its paths
        if self.is_numbered:
            self.trunk.forks = 1
            self.trunk.untried = legal_steps(problem.numbers)

    def __call__(self, request: Request, prompt: str) -> str:
        last = [*self.tags.finditer(prompt)][-1:]
        if last and last[0]["header"] and prompt.endswith(last[0]["header"]):
            return self.path(last[0][2] if self.is_numbered else "")
        return super().__call__(request, prompt)

    def locate(self, prompt: str) -> ExpertNode:
        return self.trunk

    def fork(self, node: ExpertNode, room: int) -> str:
        node.children, node.forks = [], node.forks + 1
        return self.dialect.grammar.render_rule("fork")

    def path(self, number: str) -> str:
        """What a path decodes."""
        trunk = self.trunk
        if self.is_numbered:
            steps = trunk.untried[int(number) - 1 :: self.dialect.max_width][:PATH_STEPS]
        else:
            steps = self.rng.sample(trunk.untried, min(PATH_STEPS, len(trunk.untried)))
        text, nodes = "", [trunk.child(step) for step in steps]
        trunk.children += nodes
        solution = None
        for node in nodes:
            text += self.searched(node)
            solution = node.solution
            if solution:
                break
        return text + conclusion(solution) + self.closer(number)

    def write_branch(self, node: ExpertNode) -> str:
        raise AssertionError("a path is no node")

    def first_solution(self, node: ExpertNode) -> tuple[int, list[Step]] | None:
        return next(((0, child.solution) for child in node.children if child.solution), None)

    def after_join(self, node: ExpertNode, room: int) -> str:
        tried = {child.step for child in node.children}
        node.untried = [step for step in node.untried if step not in tried]
        if self.is_numbered:
            found = self.first_solution(node)
            return conclusion(found and found[1])
        return super().after_join(node, room)

    def conclude(self, node: ExpertNode) -> str:
        return conclusion(node.solution)


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
