"""A control: how well a single word tells whether a message has several parts. A model has to do better than that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from sgl_apr.training.demonstrations.fork_reply import Demonstration


def words_of(message: str) -> set[str]:
    """Words, marks and pairs of neighbors of a message.

    Examples:
        >>> sorted(words_of("Why? Why?"))
        ['?', '? why', 'why', 'why ?']
    """
    tokens = re.findall(r"\w+|[^\w\s]|\n", message.lower())
    return {*tokens, *map(" ".join, pairwise(tokens))}


def best_keyword(made: Sequence[Demonstration]) -> tuple[str, bool]:
    """The word that tells best whether a message has several parts, and whether its presence says so or the contrary."""
    counts: dict[str, list[int]] = {}
    totals = [sum(d.is_multi_part == multi for d in made) for multi in (False, True)]
    for d in made:
        for word in words_of(d.message):
            counts.setdefault(word, [0, 0])[d.is_multi_part] += 1
    gains = {word: several / totals[1] - one / totals[0] for word, (one, several) in counts.items()}
    word = max(gains, key=lambda word: abs(gains[word]))
    return word, gains[word] > 0


def keyword_accuracy(made: Sequence[Demonstration], word: str, says_several: bool) -> float:
    """Balanced accuracy of deciding by one word whether a message has several parts."""
    return fmean(
        fmean(
            (word in words_of(d.message)) == (multi == says_several) for d in made if d.is_multi_part == multi
        )
        for multi in (True, False)
    )
