"""Countdown as methods ask for it, in the words of a model trained on it: whole searches, first steps, sub problems."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from sgl_apr.engine.base import Engine
from sgl_apr.evaluation.tasks.countdown.expert import MESSAGE_MARK
from sgl_apr.evaluation.tasks.countdown.problems import (
    Problem,
    Step,
    legal_steps,
    numbers_after,
    parse_steps,
    solves,
)
from sgl_apr.evaluation.tasks.countdown.search import SOLUTION_MARK, extract_solution
from sgl_apr.formats.dialects import Dialect
from sgl_apr.formats.presets import dialect_for
from sgl_apr.methods.graph_operations import Generate, Graph, KeepBest, Score
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.task import Inapplicable, Task

STEP = r" \d{1,2}[-+*\/] \d{1,2}= \d{1,2}"
MESSAGE_STEP = re.compile(rf">({STEP});")
MAX_PROPOSALS = 8  # steps that one proposal names at most


@dataclass(frozen=True, slots=True)
class SearchState:
    """How far a solution has come: the steps so far, and the numbers that they leave."""

    problem: Problem
    steps: tuple[Step, ...] = ()

    @property
    def remaining(self) -> Problem:
        """The problem that is left."""
        numbers = self.problem.numbers
        for step in self.steps:
            numbers = numbers_after(numbers, step)
        return Problem(numbers, self.problem.target)

    @property
    def text(self) -> str:
        """Its steps, as a solution says them."""
        return ",".join(step.text for step in self.steps)

    def apply(self, step: Step) -> SearchState | None:
        """One step further; None if the numbers that are left do not allow it."""
        return (
            SearchState(self.problem, (*self.steps, step))
            if step in legal_steps(self.remaining.numbers)
            else None
        )


class CountdownTask(Task[Problem, SearchState]):
    """For models that write sub searches as `sgl_apr.evaluation.tasks.countdown.expert` does; raises `Inapplicable` for others."""

    name = "countdown"
    max_tokens = 320  # of the longest search in a line, most are shorter
    step = 180  # of a proposal of `WIDTH` steps
    thoughts = 3
    verifiable = True
    check = ""  # there are no words in its vocabulary
    pause = "\n"

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        found = dialect_for(engine.tokenizer)
        if found is None or found.branch_context != "message":
            raise Inapplicable(
                "countdown needs a model trained on it, whose dialect joins by message: --model builtin"
            )
        self.dialect: Dialect = found

    def ask(self, problem: Problem) -> Prompt:
        return Prompt(problem.text, grammar=self._alone)

    def answer(self, text: str) -> str:
        return extract_solution(text).strip()

    def verify(self, problem: Problem, answer: str) -> bool:
        return solves(problem, answer)

    def begin(self, problem: Problem) -> SearchState:
        return SearchState(problem)

    def propose(self, state: SearchState) -> Prompt:
        """First steps, as the messages of a fork; of the last two numbers, what they give."""
        if len(state.remaining.numbers) > 2:
            return Prompt(
                f"{state.remaining.text}{self._tags[0]}",
                grammar=self._fork,
                stop=(self._tags[3],),
                tokens=self.step,
            )
        return Prompt(f"{self._told(state)}\n>", grammar="start: R\nR: /( [0-9]{1,2}){1,4}/\n", tokens=6)

    def expand(self, state: SearchState, text: str) -> Sequence[SearchState]:
        if len(state.remaining.numbers) > 2:
            named = [step for found in MESSAGE_STEP.findall(text) for step in parse_steps(found) or ()]
        else:
            results = set(map(int, re.findall(r"\d+", text)))
            named = [step for step in legal_steps(state.remaining.numbers) if step.result in results]
        return [way for step in dict.fromkeys(named) if (way := state.apply(step))]

    def solved(self, state: SearchState) -> str | None:
        return state.text.strip() if state.remaining.numbers == (state.problem.target,) else None

    def evaluate(self, state: SearchState) -> Prompt | float:
        """A sub search of what is left; a state without a step left is right or wrong."""
        if len(state.remaining.numbers) == 1:
            return float(self.solved(state) is not None)
        return Prompt(self._told(state), grammar=self._body, stop=(self._return,), tokens=100)

    def value(self, state: SearchState, thought: Completion) -> float:
        return float(SOLUTION_MARK in thought.text)

    def shared_context_prompt(
        self, problem: Problem, own: str, others: Sequence[str], past: str = ""
    ) -> tuple[str, Prompt]:
        """What the others write stands above its own, as if it had written that; a step is a line, and has no name."""
        above = (text.strip("\n") for text in (past, *others))
        return "\n".join([problem.text, *filter(None, above), own]), self.ask(problem).without_text

    def opening(self, worker: int, number: int) -> str:
        return ""

    def paused(self, text: str) -> bool:
        return text.endswith(self.pause)

    def graph(self, problem: Problem) -> Graph:
        """First steps, a sub search behind each, and what solves the problem."""
        return {
            "propose": Generate(ask=self.propose, read=self.expand),
            "search": Generate(ask=self._sub_search, read=self._searched, depends_on=("propose",)),
            "score": Score(score=lambda way: float(self.solved(way) is not None), depends_on=("search",)),
            "best": KeepBest(depends_on=("score",)),
        }

    def _sub_search(self, state: SearchState) -> Prompt | None:
        asked = self.evaluate(state)
        return asked if isinstance(asked, Prompt) else None

    def _searched(self, state: SearchState, text: str) -> Sequence[SearchState]:
        """The solution that a sub search has found, which begins with the step that it was told."""
        said = extract_solution(text.removesuffix(self._return)).strip()
        way: SearchState | None = SearchState(state.problem, state.steps[:-1])
        for step in parse_steps(f" {said}") or ():
            way = way and way.apply(step)
        return [way] if way and said else []

    def _told(self, state: SearchState) -> str:
        last = state.steps[-1].text if state.steps else ""
        return f"{MESSAGE_MARK}{last};{state.remaining.text}" if last else state.remaining.text

    @cached_property
    def _alone(self) -> str:
        return self._lowered("trunk")

    @cached_property
    def _body(self) -> str:
        return self._lowered("branch")

    def _lowered(self, phase: str) -> str:
        tokenizer, backend = self.engine.tokenizer, self.engine.grammar_backend
        return self.dialect.lower(phase, tokenizer, backend, fork="forbidden", number="1")

    @cached_property
    def _tags(self) -> tuple[str, str, str, str]:
        """What a fork opens with, one of its messages, what closes that, and the fork."""
        grammar = self.dialect.grammar
        written = grammar.render_rule("fork", each=[("1", "|")])
        opening, ending = grammar.opening_literal("fork"), grammar.closing_literal("fork")
        return (
            opening,
            grammar.opening_literal("outline"),
            written.partition("|")[2].removesuffix(ending).strip(),
            ending,
        )

    @property
    def _return(self) -> str:
        return self.dialect.grammar.closing_literal("body", "1")

    @cached_property
    def _fork(self) -> str:
        """A fork behind its opening tag, each of whose messages is a step and what it leaves."""
        _, told, end, ending = (self._tag(tag) for tag in self._tags)
        return (
            f'start: "\\n" m{{1,{MAX_PROPOSALS}}} {ending}\n'
            f'm: {told} N ":>" STEP ";" LEFT {end} "\\n"\n'
            f"N: /[1-9]/\nSTEP: /{STEP}/\nLEFT: / [0-9]{{1,2}}:( [0-9]{{1,2}})+/\n"
        )

    def _tag(self, tag: str) -> str:
        found = self.engine.tokenizer.special_token_id(tag)
        return f'"{tag}"' if found is None else f"<[{found}]>"
