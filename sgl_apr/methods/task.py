"""What methods ask of a task, and nothing of how they use it: to say a problem, steps, scores; to read and to judge."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any, Generic, NoReturn, TypeVar

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.prompt import Completion, Prompt

WORKERS = ("Alice", "Bob", "Carol", "Dave", "Eve", "Frank", "Grace", "Heidi")
SENTENCE = re.compile(r"[.?!\u2026]\s*\n\n\s*$")
P = TypeVar("P")  # a problem
S = TypeVar("S")  # how far a solution of it has come


class Inapplicable(AprError):
    """A method asks for what a task, or the model, cannot express."""


class Task(Generic[P, S]):
    """A kind of problem, as a model behind an engine is asked about it. What is not overridden cannot be expressed.

    need, step: tokens that a whole attempt takes, and one step of a search. thoughts: how many steps lead to an
    answer at most. verifiable: whether `verify` needs nothing but the problem, so that a method may ask it.
    """

    name = "task"
    max_tokens = 256
    step = 64
    thoughts = 3
    verifiable = False
    check = "Wait, am I doing redundant work? (yes/no): "  # what a worker is asked now and then
    pause = "\n\n"  # what ends a paragraph of it

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    # Every method.

    def ask(self, problem: P) -> Prompt:
        """What a model is asked that is to solve all of it."""
        self._cannot("be asked")

    def prompt(self, problem: P, instruction: str = "") -> str:
        """The same for a model that forks by itself, with what it has to be told for that."""
        return self.ask(problem).text

    def answer(self, text: str) -> str:
        """The answer that a reply ends with, empty if there is none."""
        self._cannot("read an answer")

    def vote_key(self, answer: str) -> Hashable:
        """What is counted in a vote: equal for answers that say the same."""
        return " ".join(answer.split())

    def verify(self, problem: P, answer: str) -> bool | None:
        """Whether an answer is right; None if nothing but a person can tell."""
        return None

    # Searches.

    def begin(self, problem: P) -> S:
        """Where a search begins."""
        self._cannot("be solved step by step")

    def propose(self, state: S) -> Prompt:
        """What a model is asked that is to say the next step."""
        self._cannot("be solved step by step")

    def expand(self, state: S, text: str) -> Sequence[S]:
        """What such a reply leads to; nothing if it is no step."""
        self._cannot("be solved step by step")

    def solved(self, state: S) -> str | None:
        """The answer that a state has come to, None if it has not."""
        self._cannot("be solved step by step")

    def evaluate(self, state: S) -> Prompt | float:
        """What a model is asked that is to say how good a state is; or that itself, where it is known."""
        self._cannot("judge a step")

    def value(self, state: S, thought: Completion) -> float:
        """What it said, as a number: the more the better, 0 for what leads nowhere."""
        self._cannot("judge a step")

    def show(self, state: S) -> str:
        """A state as a text to choose among."""
        self._cannot("choose among texts")

    def vote(self, problem: P, texts: Sequence[str]) -> Prompt:
        """What a model is asked that is to choose one of several texts."""
        self._cannot("choose among texts")

    def choice(self, text: str, count: int) -> int | None:
        """Which of so many it chose, from 0."""
        self._cannot("choose among texts")

    # Single methods, which say more of what they need.

    def judge(self, problem: P) -> Prompt:
        """Asks whether the reply that it stands behind is right."""
        self._cannot("judge an answer")

    def judge_score(self, thought: Completion) -> float:
        """What it said, as a number from 0 to 1."""
        self._cannot("judge an answer")

    def skeleton(self, problem: P) -> Prompt:
        """Asks for the points of an answer, without what they say."""
        self._cannot("be answered point by point")

    def points(self, text: str) -> Sequence[str]:
        """Those that such a reply has."""
        self._cannot("be answered point by point")

    def point(self, problem: P, skeleton: str | None, number: int, point: str) -> Prompt:
        """Asks for one of the points, from 1, written out: what comes goes on behind "1. " and the point.

        skeleton: the reply with all of them; None where it is asked behind that.
        """
        self._cannot("be answered point by point")

    def shared_context_prompt(
        self, problem: P, own: str, others: Sequence[str], past: str = ""
    ) -> tuple[str, Prompt]:
        """What one of several thinkers sees that read each other as they write, and how it goes on.

        own, others: what they are writing. past: what they have finished together, where they keep that (Hogwild!).
        """
        self._cannot("be thought about together")

    def opening(self, worker: int, number: int) -> str:
        """What a step of one of the workers begins with (Hogwild!, section 3.2); both from 1."""
        return f"**{WORKERS[(worker - 1) % len(WORKERS)]} [{number}]:** "

    def paused(self, text: str) -> bool:
        """Whether a step of theirs ends here: a sentence, and a paragraph, but not within code (appendix C)."""
        return bool(SENTENCE.search(text)) and text.count("```") % 2 == 0

    def has_answer(self, text: str) -> bool:
        """Whether a step of theirs says the answer."""
        return bool(self.answer(text))

    def graph(self, problem: P) -> Any:
        """A graph of operations, as `sgl_apr.methods.graph_of_thoughts` runs it."""
        self._cannot("be cut into a graph of operations")

    def program(self, problem: P) -> tuple[str, str]:
        """A question, and the text that it is about, for a model that writes programs to read it."""
        self._cannot("be answered by a program")

    def chat_turn(self, text: str, *, first: bool = True) -> str:
        """What a user says as the model knows it, up to where its reply begins; `first`: nothing stands before it."""
        return text if first else f"\n\n{text}\n\n"

    def _cannot(self, what: str) -> NoReturn:
        raise Inapplicable(f"{self.name} cannot {what}")
