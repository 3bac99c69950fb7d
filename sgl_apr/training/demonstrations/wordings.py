"""Wordings of messages, by the generator that fills them. Those of the test split are in no training data.

The decision to fork must not follow from one word: wordings of messages with several parts and with one part share openings, lists,
question marks, numbers, and words such as "and", "each" and "questions".
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from sgl_apr.training.demonstrations.fork_reply import enumeration, numbered
from sgl_apr.training.demonstrations.topics import Split, capitalized

COUNT_WORDS = ("zero", "one", "two", "three", "four", "five")
OPENINGS = ("", "", "", "", "Hi! ", "Hello. ", "Please help me. ", "Can you help me? ", "I am preparing for a quiz. ", "My friend and I have a bet. ", "Good morning! How are you? ", "Quickly, please: ")  # fmt: skip
CLOSINGS = ("", "", "", "", " Thanks!", " Thank you.", " Please be brief.", " It is for school.", " Do you know?", " I want to check my notes and be sure.")  # fmt: skip

WORDINGS: Mapping[str, Mapping[Split, Sequence[str]]] = {
    "questions": {  # {sentences}, {numbered}, {bullets}, {lettered}, {lines}, {first}, {others}, {count}
        "train": (
            "{sentences}", "{sentences}", "{numbered}", "{bullets}", "{lettered}", "{lines}", "Please answer the following.\n\n{numbered}",
            "I have {count} questions. {sentences}", "My homework:\n{bullets}", "Here is what I want to know: {sentences}",
            "{first} And another thing: {others}", "{first}\n{others}", "Tell me all of this. {sentences}", "Quiz!\n\n{lettered}",
            "Q: {first}\nQ: {others}", "There is something that I forgot. {sentences}", "{sentences} Answer everything.",
            "Someone asked me this today, and I did not know. {sentences}", "Check these for me: {sentences}", "From my exam:\n\n{numbered}",
        ),
        "test": (
            "{first}\n\nAlso: {others}", "Part A: {first} Part B: {others}", "What my teacher asked:\n{dashes}",
            "Before lunch I would like to learn this. {sentences}", "Two topics or more, one message. {sentences}", "I wonder. {first} Besides, {others}",
        ),
    },
    "question": {  # the same with one question: {question}, {topic}, {other}
        "train": (
            "{question}", "{question}", "{question}", "1. {question}", "- {question}", "(a) {question}", "Please answer the following.\n\n1. {question}",
            "I have one question. {question}", "I have three questions. I will ask the others later. {question}", "My homework:\n- {question}",
            "Here is what I want to know: {question}", "And another thing: {question}", "Tell me all of this. {question}", "Quiz!\n\n(c) {question}",
            "Q: {question}", "There is something that I forgot. {question}", "Someone asked me this today, and I did not know. {question}",
            "Check this for me: {question}", "From my exam:\n\n4. {question}", "You told me about {topic} and {other} yesterday. {question}",
            "I did numbers 1, 2 and 3 of my homework.\n\n4. {question}", "After {topic} and {other}, here comes the last one. {question}",
        ),
        "test": (
            "Also: {question}", "Part B: {question}", "What my teacher asked:\n- {question}", "Before lunch I would like to learn this. {question}",
            "One topic, one message. {question}", "I wonder. {question}", "Parts A and B are done. Part C: {question}",
        ),
    },
    "items": {  # {noun}, {nouns}, {list}, {bullets}, {numbered}, {commas}
        "train": (
            "What are the {nouns} of {list}?", "Give me the {noun} of each of these: {commas}.", "For every entry below, write its {noun}.\n{bullets}",
            "{commas}: what is the {noun} of each?", "I need the {nouns} of {list}.", "Please find the {noun} of {list}.",
            "The {noun}, please.\n{numbered}", "Tell me the {noun} of {list}.", "Make a list with the {nouns} of {list}.",
            "Here are some entries.\n{bullets}\nWhat is the {noun} in every case?", "Write the {noun} next to these:\n{numbered}",
            "What is the {noun} of {first}? And of {others}?", "Do you know the {nouns} of {list}?",
        ),
        "test": (
            "Fill in the {noun}:\n{numbered}", "Help me with the {nouns} of {list}.", "{list}. I would like to have the {noun} for all of them.",
            "State the {noun} for {commas}.", "How about the {nouns} of {list}?",
        ),
    },
    "choice": {  # one of the entries is the answer: {answer} is its {noun}
        "train": (
            "Which of {list} has the {noun} {answer}?", "One of {list} has the {noun} {answer}. Which one is it?",
            "Find the entry with the {noun} {answer}.\n{bullets}", "{commas}: which of these has {answer} as its {noun}?",
            "Look at {list}. Which one has the {noun} {answer}?", "Here are some entries.\n{bullets}\nWhich of them has the {noun} {answer}?",
            "Only one of these has the {noun} {answer}:\n{numbered}",
        ),
        "test": (
            "Among {list}, what has the {noun} {answer}?", "{answer} is the {noun} of which of these: {commas}?",
            "Pick the one whose {noun} is {answer}.\n{dashes}",
        ),
    },
    "known": {  # {known} are entries whose answers are not asked for
        "train": (
            "I already know the {nouns} of {known}. What is the {noun} of {subject}?", "Not {known}, I mean {subject}. What is its {noun}?",
            "{statements} What about {subject}?", "We did the {nouns} of {known} in class. Now tell me the {noun} of {subject}.",
            "My list has {known} and {subject}. I only need the {noun} of the last one.", "What is the {noun} of {subject}? I do not need those of {known}.",
        ),
        "test": (
            "Forget {known}. Tell me the {noun} of {subject}.", "{statements} Then what is the {noun} of {subject}?",
            "The {nouns} of {known} are easy. But what is the {noun} of {subject}?",
        ),
    },
    "comparison": {  # {a} and {b} have to be worked out first
        "train": (
            "Which is larger, {a} or {b}?", "Compare {a} with {b}.", "Is {a} more or less than {b}?", "Which is more: {a} or {b}?",
            "I have to choose between {a} and {b}. Which is the larger number?", "What is greater, {a} or {b}?",
        ),
        "test": ("Find out which is bigger: {a} or {b}.", "{a} and {b}: which one is the higher number?", "Does {a} exceed {b}?"),
    },
    "numbers": {  # {a} and {b} are two numbers, so that nothing has to be worked out
        "train": (
            "Which is larger, {a} or {b}?", "Compare {a} with {b}.", "Is {a} more or less than {b}?", "Which is more: {a} or {b}?",
            "I have to choose between {a} and {b}. Which is the larger number?", "What is greater, {a} or {b}?",
        ),
        "test": ("Find out which is bigger: {a} or {b}.", "{a} and {b}: which one is the higher number?", "Does {a} exceed {b}?"),
    },
    "list": {  # {count}, {asks}
        "train": (
            "Give me {count} {asks}.", "What are {count} {asks}?", "List {count} {asks}.", "I need {count} {asks}.", "Can you name {count} {asks}?",
            "{count} {asks}, please.", "Write {count} {asks}, with a sentence about each.", "Tell me {count} {asks}.",
        ),
        "test": ("Write down {count} {asks}.", "Think of {count} {asks}.", "Could I have {count} {asks}?", "Suggest {count} {asks} and explain them."),
    },
    "one item": {  # {one}
        "train": (
            "Give me one {one}.", "What is one {one}?", "Tell me a {one}.", "I need one {one}.", "Can you name a {one}?", "One {one}, please.",
            "Write one {one}, with a sentence about it.", "There are many. Tell me just one {one}.",
        ),
        "test": ("Write down one {one}.", "Think of a {one}.", "Could I have one {one}?", "Suggest one {one} and explain it."),
    },
}  # fmt: skip


def fill(template: str, **values: str | Sequence[str]) -> str:
    """Fill a wording. A sequence of entries also fills {list}, {commas}, {bullets}, {numbered}, ... under the name `entries`."""
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    if not isinstance(entries := values.get("entries", ""), str):
        texts |= _forms(entries)
    for name, text in texts.items():
        template = template.replace(f"{{{name}}}", text)
    return capitalized(template)


def _forms(entries: Sequence[str]) -> dict[str, str]:
    return {
        "sentences": " ".join(entries),
        "lines": "\n".join(entries),
        "numbered": numbered(entries),
        "bullets": "\n".join(f"- {entry}" for entry in entries),
        "dashes": "\n".join(f"\u2013 {entry}" for entry in entries),
        "lettered": "\n".join(
            f"({letter}) {entry}" for letter, entry in zip("abcdefgh", entries, strict=False)
        ),
        "list": enumeration(entries),
        "commas": ", ".join(entries),
        "first": entries[0],
        "others": " ".join(entries[1:]) if entries[0][-1] in ".?!" else enumeration(entries[1:]),
    }


def pick(rng: random.Random, name: str, split: Split) -> tuple[str, str]:
    """A wording of a split, and its name, which tells it from all others."""
    templates = WORDINGS[name][split]
    number = rng.randrange(len(templates))
    return templates[number], f"{name}/{split}/{number}"


def frame(rng: random.Random, message: str) -> str:
    """A message with something polite before or after it. It says nothing about how many parts the message has."""
    opening, closing = rng.choice(OPENINGS), rng.choice(CLOSINGS)
    if closing and message[-1] not in ".?!":
        closing = f"\n{closing.lstrip()}"
    if opening and message[0] in "-\u2013(123456789":
        opening = f"{opening.rstrip()}\n"
    return f"{opening}{message}{closing}"
