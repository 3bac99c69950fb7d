"""Messages with one part, and replies without a fork. Many of them resemble messages with several parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from sgl_apr.training.demonstrations.computed_topics import WORDS
from sgl_apr.training.demonstrations.fork_reply import Demonstration, enumeration
from sgl_apr.training.demonstrations.multi_part import ask, list_tables, quoted, topics
from sgl_apr.training.demonstrations.topics import Split, capitalized, fact_topics, topics_of
from sgl_apr.training.demonstrations.wordings import fill, frame, pick

NAMES = ("Anna", "Ben", "Chloe", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jack")
THINGS = ("apples", "pens", "books", "coins", "marbles", "stamps", "cards", "shells")


def question(rng: random.Random, split: Split) -> Demonstration:
    """One question."""
    drawn = ask(rng, split)
    template, name = pick(rng, "question", split)
    others = rng.sample([topic.nouns for topic in topics(split) if topic.noun != "value"], 2)
    message = fill(template, question=drawn.text, topic=others[0], other=others[1])
    return _plain(rng, "question", name, (drawn.topic,), message, drawn.statement, drawn.answer)


def choice(rng: random.Random, split: Split) -> Demonstration:
    """Which of several subjects has a given answer. What they are is known, so that there is nothing to work out."""
    topic = rng.choice(topics_of(fact_topics(), split))
    drawn = topic.ask_several(rng, rng.randint(2, 4), distinct_answers=True)
    right = rng.choice(drawn)
    template, name = pick(rng, "choice", split)
    message = fill(template, noun=topic.noun, answer=right.answer, entries=[quoted(topic, q) for q in drawn])
    return _plain(rng, "choice", name, (topic.name,), message, right.statement, right.subject)


def known(rng: random.Random, split: Split) -> Demonstration:
    """One question, beside others whose answers are known."""
    topic = rng.choice(topics(split))
    drawn, *others = topic.ask_several(rng, rng.randint(2, 4))
    template, name = pick(rng, "known", split)
    message = fill(
        template,
        noun=topic.noun,
        nouns=topic.nouns,
        subject=quoted(topic, drawn),
        known=enumeration([quoted(topic, q) for q in others]),
        statements=" ".join(q.statement for q in others),
    )
    return _plain(rng, "known", name, (topic.name,), message, drawn.statement, drawn.answer)


def numbers(rng: random.Random, split: Split) -> Demonstration:
    """Which of two numbers is larger: words as in a comparison of two values, but there is nothing to work out."""
    a, b = rng.sample(range(2, 130), 2)
    template, name = pick(rng, "numbers", split)
    low, high = sorted((a, b))
    reply = f"{high} is more than {low}, so {high} is larger."
    return _plain(rng, "numbers", name, ("numbers",), fill(template, a=str(a), b=str(b)), reply, str(high))


def one_item(rng: random.Random, split: Split) -> Demonstration:
    """One point of a list."""
    topic, table = rng.choice(list_tables(split))
    _, text = rng.choice(list(table["items"].items()))
    template, name = pick(rng, "one item", split)
    message = frame(rng, fill(template, one=table["one"]))
    return Demonstration("one item", name, (f"list {topic}",), message, text, (), is_multi_part=False)


Aggregate = tuple[str, str, str]  # message, reply and answer


def _total(rng: random.Random, split: Split) -> Aggregate:
    values = [rng.randint(2, 20) for _ in range(rng.randint(3, 4))]
    listed, total = enumeration([str(v) for v in values]), sum(values)
    templates = {
        "train": ("Add {list}.", "What is the sum of {list}?", "{list}: what do they add up to?"),
        "test": ("How much are {list} together?", "Find the total of {list}."),
    }
    return (
        rng.choice(templates[split]).replace("{list}", listed),
        f"{' + '.join(map(str, values))} = {total}.",
        str(total),
    )


def _extreme(rng: random.Random, split: Split) -> Aggregate:
    values, largest = rng.sample(range(2, 100), rng.randint(3, 5)), rng.random() < 0.5
    answer, word = (max(values), "largest") if largest else (min(values), "smallest")
    templates = {
        "train": ("What is the {word} of {list}?", "Which of the numbers {list} is the {word}?", "{list}. Find the {word} one."),
        "test": ("Tell me the {word} number: {list}.", "From {list}, pick the {word}."),
    }  # fmt: skip
    text = (
        rng.choice(templates[split])
        .replace("{word}", word)
        .replace("{list}", enumeration([str(v) for v in values]))
    )
    return text, f"The {word} number is {answer}.", str(answer)


def _sorting(rng: random.Random, split: Split) -> Aggregate:
    values = rng.sample(range(2, 60), rng.randint(3, 5))
    answer = ", ".join(map(str, sorted(values)))
    templates = {
        "train": ("Sort {list}, the smallest first.", "Put these numbers in order: {list}.", "What are {list} in ascending order?"),
        "test": ("Bring {list} into ascending order.", "Rank {list} from the lowest to the highest."),
    }  # fmt: skip
    return (
        rng.choice(templates[split]).replace("{list}", enumeration([str(v) for v in values])),
        f"In order: {answer}.",
        answer,
    )


def _alphabet(rng: random.Random, split: Split) -> Aggregate:
    words = rng.sample(WORDS, rng.randint(2, 4))
    answer = min(words)
    templates = {
        "train": (
            "Which comes first in the alphabet: {list}?",
            "Of the words {list}, which one is first in a dictionary?",
        ),
        "test": (
            "Which of {list} does a dictionary list first?",
            "{list}: say which one leads in alphabetical order.",
        ),
    }
    listed = enumeration([f'"{w}"' for w in words])
    return (
        rng.choice(templates[split]).replace("{list}", listed),
        f'"{answer}" comes first in the alphabet.',
        answer,
    )


def _story(rng: random.Random, split: Split) -> Aggregate:
    name, thing, a, b, c = rng.choice(NAMES), rng.choice(THINGS), *(rng.randint(2, 12) for _ in range(3))
    answer, stories = {
        0: (a * b, {
            "train": f"Each of {a} boxes holds {b} {thing}. How many {thing} are there?",
            "test": f"There are {a} bags, and {name} puts {b} {thing} into each bag. How many {thing} does {name} need?",
        }),
        1: (a + b + c, {
            "train": f"{name} has {a} {thing}. A friend gives {name} {b} more, and then {c} more. How many {thing} does {name} have?",
            "test": f"On Monday {name} found {a} {thing}, on Tuesday {b} and on Friday {c}. How many {thing} were found in all?",
        }),
        2: (a + b, {
            "train": f"{name} had {a + b + c} {thing} and lost {c} of them. How many are left?",
            "test": f"A shop had {a + b + c} {thing}. It sold {c}. What is left, and nothing else, is my question.",
        }),
    }[rng.randrange(3)]  # fmt: skip
    return stories[split], f"The answer is {answer}.", str(answer)


AGGREGATES = {
    "total": _total,
    "extreme": _extreme,
    "sorting": _sorting,
    "alphabet": _alphabet,
    "story": _story,
}


def aggregate(rng: random.Random, split: Split) -> Demonstration:
    """One answer that needs several numbers or words at once."""
    name = rng.choice(list(AGGREGATES))
    message, reply, answer = AGGREGATES[name](rng, split)
    return _plain(rng, "aggregate", f"aggregate/{split}/{name}", (name,), message, reply, answer)


def _plain(
    rng: random.Random, kind: str, template: str, about: Sequence[str], message: str, reply: str, answer: str
) -> Demonstration:
    message = frame(rng, capitalized(message))
    return Demonstration(kind, template, tuple(about), message, reply, (answer,), is_multi_part=False)


GENERATORS: dict[Callable[[random.Random, Split], Demonstration], float] = {
    question: 0.38,
    choice: 0.15,
    known: 0.14,
    numbers: 0.08,
    one_item: 0.12,
    aggregate: 0.13,
}
