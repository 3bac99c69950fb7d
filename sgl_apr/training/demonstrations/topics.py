"""Topics: what single questions are about. Each question has one answer, which is looked up in a table or computed."""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Split = Literal["train", "test"]
ARTICLE = re.compile(r"\b([aA])(?= (?:[aeio]|8\b))")  # before a vowel
Draw = Callable[[random.Random], tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Question:
    """A question that stands alone.

    Attributes:
        topic: Name of its topic.
        subject: What it asks about, such as "France".
        text: The question, such as "What is the capital of France?".
        answer: The answer, such as "Paris".
        statement: The answer as a sentence.
        label: A few words that name the question, as an outline does.
    """

    topic: str
    subject: str
    text: str
    answer: str
    statement: str
    label: str


@dataclass(frozen=True, slots=True)
class Topic:
    """Questions of one kind. In the texts, {x} is the subject and {y} the answer.

    Attributes:
        name: Its name.
        noun: What is asked for, as in "the capital of France".
        nouns: The same of several subjects.
        questions: Wordings of the question.
        statement: The sentence that answers it.
        draw: Draws a subject and its answer.
        label: Names a question in an outline.
        is_numeric: Whether answers are numbers that can be compared.
        held_out: Whether the topic is in the test split alone.
    """

    name: str
    noun: str
    nouns: str
    questions: tuple[str, ...]
    statement: str
    draw: Draw
    label: str = "{noun} of {x}"
    is_numeric: bool = False
    held_out: bool = False

    def ask(self, rng: random.Random) -> Question:
        """A random question of this topic."""
        subject, answer = self.draw(rng)
        return self._question(rng, subject, answer)

    def ask_several(
        self, rng: random.Random, count: int, *, distinct_answers: bool = False
    ) -> list[Question]:
        """Questions with different subjects, in random order.

        Args:
            rng: Draws them.
            count: How many.
            distinct_answers: No two of them have the same answer.
        """
        chosen: dict[str, Question] = {}
        while len(chosen) < count:
            question = self.ask(rng)
            if not distinct_answers or all(question.answer != q.answer for q in chosen.values()):
                chosen.setdefault(question.subject, question)
        return list(chosen.values())

    def _question(self, rng: random.Random, x: str, y: str) -> Question:
        def fill(text: str) -> str:
            filled = text.replace("{noun}", self.noun).replace("{x}", x).replace("{y}", y)
            return ARTICLE.sub(r"\1n", filled)

        text, statement = (capitalized(fill(t)) for t in (rng.choice(self.questions), self.statement))
        return Question(self.name, x, text, y, statement, fill(self.label))


def capitalized(text: str) -> str:
    """A text that begins with a capital letter, the rest of it as it is."""
    return text[:1].upper() + text[1:]


@cache
def fact_topics() -> tuple[Topic, ...]:
    """The topics of facts.toml."""
    tables = tomllib.loads(files(__package__).joinpath("facts.toml").read_text(encoding="utf-8"))
    return tuple(_fact_topic(name, table) for name, table in tables.items())


def _fact_topic(name: str, table: dict[str, Any]) -> Topic:
    pairs: list[tuple[str, str]] = list(table["pairs"].items())
    return Topic(
        name,
        table["noun"],
        table["nouns"],
        tuple(table["questions"]),
        table["statement"],
        lambda rng: rng.choice(pairs),
        table.get("label", "{noun} of {x}"),
        is_numeric=table.get("numeric", False),
        held_out=table.get("held_out", False),
    )


def topics_of(topics: Sequence[Topic], split: Split) -> list[Topic]:
    """The topics of a split: those of the test are not in the training data."""
    return [topic for topic in topics if topic.held_out == (split == "test")]
