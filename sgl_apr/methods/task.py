"""What a task gives to the methods that solve its problems: prompts, and readings of what a model replies.

`Task` is what all tasks have in common. Each family of methods needs one or more of its subclasses, so a task inherits
from those whose methods it supports:

| class | needed by |
|---|---|
| `SampledTask` | `pro`, `sequential`, `self_consistency`, `best_of_n`, `value_guided`, `deepconf`, models that fork by themselves |
| `SelfJudgedTask` | `best_of_n` without a verifier |
| `AggregationTask` | `pacore`, `rsa` |
| `SkeletonTask` | `skeleton_of_thought` |
| `SearchTask` with `ValuedSearchTask` | `tree_of_thoughts`, `spex`, `mcts` |
| `SearchTask` with `VotedSearchTask` | `tree_of_thoughts` with `select="vote"` |
| `GraphTask` | `graph_of_thoughts` |
| `CollaborativeTask` | `group_think`, `hogwild` |
| `ProgramTask` | `recursive` |
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.graph_operations import Graph
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.trajectory.worker_groups import GroupKind

WORKERS = ("Alice", "Bob", "Carol", "Dave", "Eve", "Frank", "Grace", "Heidi")
END_OF_SENTENCE = (".", "?", "!", "\u2026")
P = TypeVar("P")
S = TypeVar("S")


class Inapplicable(AprError):
    """A method needs something that the task, or the model, cannot express."""


class Task(Generic[P]):
    """A kind of problem, posed to the model of an engine. `P` is the type of a problem.

    Attributes:
        name: How errors name the task.
        ability: What the family of methods requires of a task; errors say "NAME cannot ABILITY".
        max_tokens: Tokens that a complete attempt may take.
        step_tokens: Tokens of one step of a search, an operation of a graph, or a judgement.
        verifiable: Whether `verify` needs only the problem, so that a method may use it as its verifier.
        comparable: Whether the answers of two replies can be equal, so that a vote can decide between them.
        min_fork_tokens: The least budget with which a model that forks by itself should, two complete attempts by default. Under
            a smaller one `apr` and `pro` ask for one reply without forks.
    """

    name = "task"
    ability: ClassVar[str] = "be asked"
    max_tokens = 256
    step_tokens = 64
    verifiable = False
    comparable = True

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def min_fork_tokens(self) -> int:
        return 2 * self.max_tokens

    def answer(self, text: str) -> str:
        """The final answer of a reply, empty if it has none."""
        raise Inapplicable(f"{self.name} cannot read an answer")

    def vote_key(self, answer: str) -> Hashable:
        """What a vote counts: equal for answers that mean the same."""
        return " ".join(answer.split())

    def verify(self, problem: P, answer: str) -> bool | None:
        """Whether an answer is correct; None if only a person can tell."""
        return None


F = TypeVar("F", bound=Task[Any])


def require_family(task: Task[Any], family: type[F]) -> F:
    """The task as one of a family.

    Args:
        task: Any task.
        family: One of the subclasses of `Task` in this module.

    Raises:
        Inapplicable: If the task does not inherit from the family.
    """
    if not isinstance(task, family):
        raise Inapplicable(f"{task.name} cannot {family.ability}")
    return task


class SampledTask(Task[P]):
    """A task whose problems fit one prompt."""

    ability: ClassVar[str] = "be asked"

    def prompt(self, problem: P) -> Prompt:
        """The prompt for a complete solution."""
        raise NotImplementedError

    def prompt_text(self, problem: P, instruction: str = "") -> str:
        """The same for a model that forks by itself, with the instruction that its format needs."""
        return self.prompt(problem).text

    def branch_solves(self, problem: P, text: str) -> bool | None:
        """Whether what a branch wrote or returned contains a correct answer to the problem; None if the task cannot tell."""
        return None


class SelfJudgedTask(Task[P]):
    """A task whose model can be asked whether a reply is correct."""

    ability: ClassVar[str] = "judge an answer"

    def judge_prompt(self, problem: P) -> Prompt:
        """The question whether the reply before it is correct."""
        raise NotImplementedError

    def judge_score(self, completion: Completion) -> float:
        """The judgement as a number from 0 to 1."""
        raise NotImplementedError


class AggregationTask(SampledTask[P]):
    """A task whose model can make one better reply of several."""

    ability: ClassVar[str] = "make one reply of several"

    def compact(self, text: str) -> str:
        """The message that a reply leaves for the next round: what it says after its thoughts, if it marks them.

        Examples:
            >>> AggregationTask.compact(None, "<think>7 times 6</think> It is 42.")
            'It is 42.'
        """
        return text.rpartition("</think>")[2].strip()

    def aggregation_prompt(self, problem: P, replies: Sequence[str]) -> Prompt:
        """The prompt for a new reply.

        Args:
            problem: The problem.
            replies: Earlier replies, or what was kept of them.
        """
        raise NotImplementedError


class SkeletonTask(Task[P]):
    """A task whose answers consist of points that can be written independently."""

    ability: ClassVar[str] = "be answered point by point"

    def skeleton_prompt(self, problem: P) -> Prompt:
        """The prompt for a list of points, without their content."""
        raise NotImplementedError

    def points(self, text: str) -> Sequence[str]:
        """The points in such a reply."""
        raise NotImplementedError

    def point_prompt(self, problem: P, skeleton: str | None, number: int, point: str) -> Prompt:
        """The prompt to write out one point; the completion continues after "1. " and the point.

        Args:
            problem: The problem.
            skeleton: The reply with all points; None if the prompt follows that reply.
            number: The number of the point, from 1.
            point: The text of the point.
        """
        raise NotImplementedError


class StateTask(Task[P], Generic[P, S]):
    """A task that is solved through intermediate states. `S` is the type of a state; equal states are searched once."""

    ability: ClassVar[str] = "be solved step by step"

    def initial_state(self, problem: P) -> S:
        """The state before the first step."""
        raise NotImplementedError

    def solution(self, state: S) -> str | None:
        """The answer that a state contains, None if it is no solution yet."""
        raise NotImplementedError


class SearchTask(StateTask[P, S]):
    """A task that is solved step by step.

    Attributes:
        max_steps: The largest number of steps that lead to an answer.
    """

    max_steps = 3

    def proposal_prompt(self, state: S) -> Prompt:
        """The prompt for the next step; the reply may name several alternatives."""
        raise NotImplementedError

    def expand(self, state: S, text: str) -> Sequence[S]:
        """The states that such a reply leads to; empty if it contains no step."""
        raise NotImplementedError


class ValuedSearchTask(SearchTask[P, S]):
    """A search task whose states can be valued."""

    ability: ClassVar[str] = "judge a step"

    def evaluate(self, state: S) -> Prompt | float:
        """The prompt for the value of a state, or the value itself where it is known."""
        raise NotImplementedError

    def value(self, state: S, completion: Completion) -> float:
        """The value in such a completion: higher is better, 0 for a dead end."""
        raise NotImplementedError


class VotedSearchTask(SearchTask[P, S]):
    """A search task whose model can choose among states."""

    ability: ClassVar[str] = "choose among texts"

    def show(self, state: S) -> str:
        """A state as text."""
        raise NotImplementedError

    def vote_prompt(self, problem: P, texts: Sequence[str]) -> Prompt:
        """The prompt to choose one of several texts."""
        raise NotImplementedError

    def choice(self, text: str, count: int) -> int | None:
        """The index from 0 of the chosen one of `count` texts, None if the reply chooses none."""
        raise NotImplementedError


class GraphTask(StateTask[P, S]):
    """A task that is solved by a graph of operations."""

    ability: ClassVar[str] = "be cut into a graph of operations"

    def graph(self, problem: P) -> Graph:
        """The operations by name; `sgl_apr.methods.graph_operations` defines them."""
        raise NotImplementedError


class CollaborativeTask(Task[P]):
    """A task that several workers can solve together while they read each other.

    Attributes:
        redundancy_question: What a worker is asked from time to time (Hogwild!, arXiv 2504.06261).
        step_separator: The text that ends a paragraph of a worker.
    """

    ability: ClassVar[str] = "be thought about together"
    redundancy_question = "Wait, am I doing redundant work? (yes/no): "
    step_separator = "\n\n"

    def shared_context_prompt(
        self, problem: P, own: str, others: Sequence[str], past: str = ""
    ) -> tuple[str, Prompt]:
        """What one worker sees.

        Args:
            problem: The problem.
            own: What the worker is writing.
            others: What the other workers are writing.
            past: The steps that all of them have finished, where the method keeps those (Hogwild!).

        Returns:
            The context, and the prompt that continues it.
        """
        raise NotImplementedError

    def worker_prompts(self, problem: P, workers: int, kind: GroupKind) -> tuple[str, Sequence[Prompt]]:
        """What workers begin with where the engine decodes them as one group, so that each token sees all tokens so far.

        By default it is the context of a worker that sees nothing yet, and the worker's name: for Hogwild! as it opens a
        step.

        Args:
            problem: The problem.
            workers: Number of workers.
            kind: How they see each other.

        Returns:
            The text that all of them share, and for each worker its header with how it decodes. No header is empty.
        """
        context, prompt = self.shared_context_prompt(problem, "", [""] * (workers - 1))
        names = [WORKERS[k % len(WORKERS)] for k in range(workers)]
        headers = (
            [self.step_opening(number, 1) for number in range(1, workers + 1)]
            if kind == "hogwild"
            else [f"**{name}:** " for name in names]
        )
        prompts = [
            replace(prompt, text=prompt.text + header, name=name)
            for header, name in zip(headers, names, strict=True)
        ]
        return context, prompts

    def step_opening(self, worker: int, number: int) -> str:
        """How a step of a worker begins (Hogwild!, section 3.2); both numbers count from 1."""
        return f"**{WORKERS[(worker - 1) % len(WORKERS)]} [{number}]:** "

    def is_step_complete(self, text: str) -> bool:
        """Whether a step ends here: after a sentence and a paragraph, outside of code (Hogwild!, appendix C)."""
        sentence = text.rstrip()
        ends = sentence.endswith(END_OF_SENTENCE) and "\n\n" in text[len(sentence) :]
        return ends and text.count("```") % 2 == 0

    def has_answer(self, text: str) -> bool:
        """Whether a step contains the final answer."""
        return bool(self.answer(text))


class ProgramTask(Task[P]):
    """A task about a text that a model can read by programs."""

    ability: ClassVar[str] = "be answered by a program"

    def program(self, problem: P) -> tuple[str, str]:
        """The question, and the text that it is about."""
        raise NotImplementedError

    def chat_turn(self, text: str, *, first: bool = True) -> str:
        """A user's message in the chat format of the model, up to where the reply begins.

        Args:
            text: The message.
            first: Whether nothing comes before it.
        """
        return text if first else f"\n\n{text}\n\n"
