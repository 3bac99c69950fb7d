"""Countdown as a task, in the format of a model trained on it: complete searches, first steps, sub searches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sgl_apr.engine.base import Engine
from sgl_apr.evaluation.tasks.countdown.expert import STATE_MARK
from sgl_apr.evaluation.tasks.countdown.problems import (
    LARGEST_INTERMEDIATE,
    Problem,
    Step,
    legal_steps,
    numbers_after,
    parse_steps,
    solves,
)
from sgl_apr.evaluation.tasks.countdown.search import SOLUTION_MARK, extract_solution
from sgl_apr.formats.dialects import Dialect
from sgl_apr.formats.presets import known_dialects
from sgl_apr.methods.graph_operations import Generate, Graph, KeepBest, Score
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.task import CollaborativeTask, GraphTask, Inapplicable, SampledTask, ValuedSearchTask
from sgl_apr.trajectory.worker_groups import GroupKind

STEP = r" \d{1,2}[-+*\/] \d{1,2}= \d{1,2}"
MESSAGE_STEP = re.compile(rf">({STEP});")
MAX_PROPOSALS = 8  # steps in one proposal


@dataclass(frozen=True, slots=True)
class SearchState:
    """A partial solution: the steps so far."""

    problem: Problem
    steps: tuple[Step, ...] = ()

    @property
    def remaining(self) -> Problem:
        """The problem that these steps leave."""
        numbers = self.problem.numbers
        for step in self.steps:
            numbers = numbers_after(numbers, step)
        return Problem(numbers, self.problem.target)

    @property
    def text(self) -> str:
        """The steps, as a solution writes them."""
        return ",".join(step.text for step in self.steps)

    def apply(self, step: Step) -> SearchState | None:
        """The state after one more step; None if the remaining numbers do not allow it."""
        return (
            SearchState(self.problem, (*self.steps, step))
            if step in legal_steps(self.remaining.numbers)
            else None
        )


class CountdownTask(
    SampledTask[Problem],
    ValuedSearchTask[Problem, SearchState],
    GraphTask[Problem, SearchState],
    CollaborativeTask[Problem],
):
    """Countdown, for models that write sub searches as `sgl_apr.evaluation.tasks.countdown.branch_experts` does.

    Raises:
        Inapplicable: If the tokenizer of the engine belongs to another kind of model.
    """

    name = "countdown"
    # Nine of ten replies of the built-in model without forks are shorter (200 problems of the training split).
    max_tokens = 1024
    step_tokens = 180  # a proposal of `MAX_PROPOSALS` steps
    max_steps = 3
    verifiable = True
    redundancy_question = ""  # the model's vocabulary has no words
    step_separator = "\n"

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        known = known_dialects(engine.tokenizer)
        suitable = [each for each in known if each.branch_context == "message"]
        if len(engine.tokenizer.encode(f" {LARGEST_INTERMEDIATE}")) == 1:  # the vocabulary of such models
            suitable += known
        if not suitable:
            raise Inapplicable("countdown needs a model trained on it: --model builtin")
        self.dialect: Dialect = suitable[0]

    @property
    def min_fork_tokens(self) -> int:
        """Twice a complete attempt; 0 for models that know messages alone, which cannot search without branches."""
        known = known_dialects(self.engine.tokenizer)
        return 0 if all(each.branch_context == "message" for each in known) else 2 * self.max_tokens

    def prompt(self, problem: Problem) -> Prompt:
        return Prompt(problem.text, grammar=self._search_grammar)

    def answer(self, text: str) -> str:
        return extract_solution(text).strip()

    def verify(self, problem: Problem, answer: str) -> bool:
        return solves(problem, answer)

    def branch_solves(self, problem: Problem, text: str) -> bool:
        """Whether the last line of a branch claims a solution of the complete problem that is one."""
        return solves(problem, extract_solution(text))

    def initial_state(self, problem: Problem) -> SearchState:
        return SearchState(problem)

    def proposal_prompt(self, state: SearchState) -> Prompt:
        """Propose steps as the messages of a fork; for the last two numbers, propose results."""
        if len(state.remaining.numbers) > 2:
            return Prompt(
                f"{state.remaining.text}{self._tags[0]}",
                grammar=self._proposal_grammar,
                stop=(self._tags[3],),
                tokens=self.step_tokens,
            )
        return Prompt(f"{self._message(state)}\n>", grammar="start: R\nR: /( [0-9]{1,2}){1,4}/\n", tokens=6)

    def expand(self, state: SearchState, text: str) -> Sequence[SearchState]:
        if len(state.remaining.numbers) > 2:
            proposed = [step for match in MESSAGE_STEP.findall(text) for step in parse_steps(match) or ()]
        else:
            results = set(map(int, re.findall(r"\d+", text)))
            proposed = [step for step in legal_steps(state.remaining.numbers) if step.result in results]
        return [child for step in dict.fromkeys(proposed) if (child := state.apply(step))]

    def solution(self, state: SearchState) -> str | None:
        return state.text.strip() if state.remaining.numbers == (state.problem.target,) else None

    def evaluate(self, state: SearchState) -> Prompt | float:
        """A sub search of the remaining problem; 1 or 0 for a state with a single number left."""
        if len(state.remaining.numbers) == 1:
            return float(self.solution(state) is not None)
        return Prompt(
            self._message(state), grammar=self._sub_search_grammar, stop=(self._return_tag,), tokens=100
        )

    def value(self, state: SearchState, completion: Completion) -> float:
        return float(SOLUTION_MARK in completion.text)

    def shared_context_prompt(
        self, problem: Problem, own: str, others: Sequence[str], past: str = ""
    ) -> tuple[str, Prompt]:
        """The text of the others stands above the worker's own, as if it had written that; a step is a line without a name."""
        above = (text.strip("\n") for text in (past, *others))
        return "\n".join([problem.text, *filter(None, above), own]), self.prompt(problem).without_text

    def worker_prompts(self, problem: Problem, workers: int, kind: GroupKind) -> tuple[str, Sequence[Prompt]]:
        """All begin a search of the same problem with a line break. The model's vocabulary has no names."""
        prompt = replace(self.prompt(problem), text=self.step_separator)
        return problem.text, [prompt] * workers

    def step_opening(self, worker: int, number: int) -> str:
        return ""

    def is_step_complete(self, text: str) -> bool:
        return text.endswith(self.step_separator)

    def graph(self, problem: Problem) -> Graph:
        """Propose first steps, run a sub search of each, and keep what solves the problem."""
        return {
            "propose": Generate(prompt=self.proposal_prompt, read=self.expand),
            "search": Generate(prompt=self._sub_search, read=self._read_sub_search, depends_on=("propose",)),
            "score": Score(
                score=lambda state: float(self.solution(state) is not None), depends_on=("search",)
            ),
            "best": KeepBest(depends_on=("score",)),
        }

    def _sub_search(self, state: SearchState) -> Prompt | None:
        prompt = self.evaluate(state)
        return prompt if isinstance(prompt, Prompt) else None

    def _read_sub_search(self, state: SearchState, text: str) -> Sequence[SearchState]:
        """The solution of a sub search, whose first step is the one in its message."""
        solution = extract_solution(text.removesuffix(self._return_tag)).strip()
        result: SearchState | None = SearchState(state.problem, state.steps[:-1])
        for step in parse_steps(f" {solution}") or ():
            result = result and result.apply(step)
        return [result] if result and solution else []

    def _message(self, state: SearchState) -> str:
        """The message of a branch that searches on from a state."""
        last = state.steps[-1].text if state.steps else ""
        return f"{STATE_MARK}{last};{state.remaining.text}" if last else state.remaining.text

    @cached_property
    def _search_grammar(self) -> str:
        return self._mask("trunk")

    @cached_property
    def _sub_search_grammar(self) -> str:
        return self._mask("branch")

    def _mask(self, phase: str) -> str:
        if phase == "branch":
            self._require_messages()
        tokenizer, backend = self.engine.tokenizer, self.engine.grammar_backend
        return self.dialect.lower(phase, tokenizer, backend, fork="forbidden", number="1")

    def _require_messages(self) -> None:
        if self.dialect.branch_context != "message":
            raise Inapplicable(
                f"first steps and sub searches need a model whose branches get a message, not {self.dialect.name}"
            )

    @cached_property
    def _tags(self) -> tuple[str, str, str, str]:
        """The opening tags of a fork and of a message, the closing tags of a message and of a fork."""
        self._require_messages()
        grammar = self.dialect.grammar
        fork = grammar.render_rule("fork", each=[("1", "|")])
        opening, ending = grammar.opening_literal("fork"), grammar.closing_literal("fork")
        return (
            opening,
            grammar.opening_literal("outline"),
            fork.partition("|")[2].removesuffix(ending).strip(),
            ending,
        )

    @property
    def _return_tag(self) -> str:
        return self.dialect.grammar.closing_literal("body", "1")

    @cached_property
    def _proposal_grammar(self) -> str:
        """A fork after its opening tag; each of its messages is a step and the problem that it leaves."""
        _, message, end, ending = (self._tag(tag) for tag in self._tags)
        return (
            f'start: "\\n" m{{1,{MAX_PROPOSALS}}} {ending}\n'
            f'm: {message} N ":>" STEP ";" LEFT {end} "\\n"\n'
            f"N: /[1-9]/\nSTEP: /{STEP}/\nLEFT: / [0-9]{{1,2}}:( [0-9]{{1,2}})+/\n"
        )

    def _tag(self, tag: str) -> str:
        token_id = self.engine.tokenizer.special_token_id(tag)
        return f'"{tag}"' if token_id is None else f"<[{token_id}]>"
