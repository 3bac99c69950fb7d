"""Ordinary instructions, to which the base model writes the replies: they keep what it does where there is nothing to fork."""

from __future__ import annotations

import random
from itertools import product

from sgl_apr.errors import AprError
from sgl_apr.training.demonstrations.topics import Split

TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "What is {x}?", "Explain {x} to a child.", "Explain {x} in simple words, please.", "Write a short poem about {x}.", "Write two sentences about {x}.",
        "Why is {x} important?", "Tell me something interesting about {x}.", "Write a short story about {x}.", "Describe {x} in one paragraph.",
        "Write a funny headline about {x}.", "How would you describe {x} to somebody who has never heard of it?", "Write a short dialogue about {x}.",
        "What do people like about {x}?", "What is the history of {x}?", "I am writing an essay about {x}. Write the first paragraph.",
        "Hi! I would like to know more about {x}. Can you help me?", "What should a beginner know about {x}?", "Summarize what you know about {x}.",
        "Write a slogan for a shop that is all about {x}.", "Who should learn about {x}, and why?", "Write a diary entry that mentions {x}.",
        "Is {x} good or bad? Give your opinion.", "What would the world be like without {x}?", "Write an email to a friend about {x}.",
        "What is the most surprising thing about {x}?", "How did people discover {x}?", "Make up a riddle about {x}.", "Thank a teacher for a lesson about {x}.",
    ),
    "test": (
        "Define {x} in one sentence.", "Give a short introduction to {x}.", "Write a limerick about {x}.", "How does {x} affect people?", "What comes to your mind when you think of {x}?",
        "Tell a bedtime story about {x}.", "Please write a short blog post about {x}.", "What makes {x} special?", "Write a paragraph that praises {x}.",
    ),
}  # fmt: skip
SUBJECTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "photosynthesis", "gravity", "the internet", "coffee", "tea", "bread", "jazz", "classical music", "football", "swimming", "chess", "painting",
        "poetry", "electricity", "solar energy", "recycling", "rain", "snow", "volcanoes", "earthquakes", "rivers", "mountains", "forests", "the Sun",
        "the Moon", "Mars", "comets", "dinosaurs", "whales", "elephants", "bees", "butterflies", "cats", "dogs", "horses", "penguins", "spiders", "birds",
        "roses", "trees", "potatoes", "rice", "cheese", "chocolate", "salt", "sugar", "honey", "water", "air", "fire", "gold", "iron", "glass", "paper",
        "books", "libraries", "schools", "hospitals", "bridges", "trains", "airplanes", "bicycles", "ships", "cars", "robots", "computers", "telephones",
        "cameras", "movies", "television", "radio", "newspapers", "maps", "clocks", "calendars", "money", "banks", "markets", "democracy", "laws",
        "friendship", "honesty", "courage", "patience", "dreams", "sleep", "memory", "languages", "mathematics", "geometry", "statistics", "history",
        "archaeology", "castles", "pyramids", "gardens", "camping", "cooking", "baking", "knitting", "dancing", "singing", "theater", "photography",
    ),
    "test": (
        "lighthouses", "the violin", "thunderstorms", "glaciers", "owls", "turtles", "strawberries", "pottery", "umbrellas", "kindness", "evolution",
        "the heart", "vaccines", "satellites", "deserts", "tides", "carpentry", "soccer fans", "yoga", "humor",
    ),
}  # fmt: skip


def plain_messages(split: Split, count: int, seed: int = 0) -> list[str]:
    """Different messages in random order. A larger count adds messages at the end.

    Args:
        split: Templates and subjects of the test split are in no training data.
        count: How many.
        seed: Seed of the order.

    Raises:
        AprError: There are not as many.
    """
    pairs = list(product(TEMPLATES[split], SUBJECTS[split]))
    random.Random(f"{seed} {split}").shuffle(pairs)
    messages = [template.replace("{x}", subject) for template, subject in pairs]
    if count > len(messages):
        raise AprError(f"count = {count}, expected at most the {len(messages)} messages that there are")
    return messages[:count]
