"""Messages with several parts that do not need one another, and replies with a branch for each part."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from sgl_apr.training.demonstrations.computed_topics import computed_topics
from sgl_apr.training.demonstrations.fork_reply import Demonstration, fork_reply, numbered
from sgl_apr.training.demonstrations.gym_questions import ask_puzzle
from sgl_apr.training.demonstrations.topics import Question, Split, Topic, fact_topics, topics_of
from sgl_apr.training.demonstrations.wordings import COUNT_WORDS, fill, frame, pick

PART_COUNTS, PART_WEIGHTS = (2, 3, 4, 5), (4, 4, 2, 1)
PUZZLE_SHARE = 0.15  # of the questions, how many are puzzles of reasoning-gym


@cache
def topics(split: Split) -> list[Topic]:
    """All topics of a split."""
    return topics_of([*fact_topics(), *computed_topics()], split)


def ask(rng: random.Random, split: Split) -> Question:
    """A random question: a puzzle, or of any topic."""
    if rng.random() < PUZZLE_SHARE:
        return ask_puzzle(rng, split)
    return rng.choice(topics(split)).ask(rng)


def draw_part_count(rng: random.Random) -> int:
    """How many parts a message has."""
    return rng.choices(PART_COUNTS, PART_WEIGHTS)[0]


def questions(rng: random.Random, split: Split) -> Demonstration:
    """Several questions of different topics, or of one."""
    count = draw_part_count(rng)
    drawn: dict[str, Question] = {}
    topic = rng.choice(topics(split)) if rng.random() < 0.25 else None
    while len(drawn) < count:
        question = topic.ask(rng) if topic else ask(rng, split)
        drawn.setdefault(f"{question.topic} {question.subject}", question)
    template, name = pick(rng, "questions", split)
    message = fill(template, count=COUNT_WORDS[count], entries=[q.text for q in drawn.values()])
    return _forked(rng, "questions", name, message, list(drawn.values()), None)


def items(rng: random.Random, split: Split) -> Demonstration:
    """One question about several subjects."""
    topic = rng.choice(topics(split))
    drawn = topic.ask_several(rng, draw_part_count(rng))
    template, name = pick(rng, "items", split)
    message = fill(template, noun=topic.noun, nouns=topic.nouns, entries=[quoted(topic, q) for q in drawn])
    answer = "\n".join(f"{q.subject}: {q.answer}" for q in drawn)
    return _forked(rng, "items", name, message, drawn, answer)


def comparison(rng: random.Random, split: Split) -> Demonstration:
    """Which of two values is larger, where both have to be worked out."""
    topic = rng.choice([topic for topic in topics(split) if topic.is_numeric])
    drawn = topic.ask_several(rng, 2, distinct_answers=True)
    names = [q.label if topic.noun == "value" else f"the {q.label}" for q in drawn]
    template, name = pick(rng, "comparison", split)
    message = fill(template, a=names[0], b=names[1])
    (low, _), (high, larger) = sorted((int(q.answer), name) for q, name in zip(drawn, names, strict=True))
    answer = f"{high} is more than {low}, so {larger} is larger."
    return _forked(rng, "comparison", name, message, drawn, answer)


def list_of_points(rng: random.Random, split: Split) -> Demonstration:
    """A list of which each point is explained."""
    topic, table = rng.choice(list_tables(split))
    points = list(table["items"].items())
    chosen = rng.sample(points, min(draw_part_count(rng), len(points)))
    template, name = pick(rng, "list", split)
    message = frame(rng, fill(template, count=COUNT_WORDS[len(chosen)], asks=table["asks"]))
    reply = fork_reply(
        [(title.lower(), text) for title, text in chosen], numbered([title for title, _ in chosen])
    )
    return Demonstration("list", name, (f"list {topic}",), message, reply, (), is_multi_part=True)


@cache
def list_tables(split: Split) -> list[tuple[str, dict[str, Any]]]:
    """The lists of lists.toml, by name."""
    tables = tomllib.loads(files(__package__).joinpath("lists.toml").read_text(encoding="utf-8"))
    return [(name, t) for name, t in tables.items() if t.get("held_out", False) == (split == "test")]


def quoted(topic: Topic, question: Question) -> str:
    """The subject of a question as other messages name it; a word is quoted where the answer quotes it."""
    return f'"{question.subject}"' if '"{x}"' in topic.statement else question.subject


def _forked(
    rng: random.Random, kind: str, template: str, message: str, drawn: Sequence[Question], answer: str | None
) -> Demonstration:
    if answer is None:
        answer = numbered([q.answer for q in drawn])
    return Demonstration(
        kind,
        template,
        tuple(q.topic for q in drawn),
        frame(rng, message),
        fork_reply([(q.label, q.statement) for q in drawn], answer),
        tuple(q.answer for q in drawn),
        is_multi_part=True,
    )


GENERATORS: dict[Callable[[random.Random, Split], Demonstration], float] = {
    questions: 0.4,
    items: 0.25,
    comparison: 0.15,
    list_of_points: 0.2,
}
