"""Finds parts of the spellings of added tokens at the edges of a text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache


class SpellingParts:
    """Finds in a text what is only a part of a spelling of an added token.

    Args:
        spellings: The spellings.
    """

    def __init__(self, spellings: frozenset[str]) -> None:
        self._beginnings = sorted(spellings)
        self._endings = sorted(spelling[::-1] for spelling in spellings)
        self._longest = max(map(len, spellings), default=1) - 1
        self._all = "\0".join(self._beginnings)

    def edges(self, text: str) -> list[tuple[int, int]]:
        """Return the beginning and the end of a text if they are parts of spellings, also without outer spaces.

        Return all of the text if that is a part of a spelling.
        """
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        if first >= last:
            return []
        if last - first <= self._longest and text[first:last] in self._all:
            return [(first, last)]
        ranges = list[tuple[int, int]]()
        for end in {last, len(text)}:
            if length := self._length(text[max(0, end - self._longest) : end], self._beginnings):
                ranges.append((end - length, end))
        for start in {0, first}:
            if length := self._length(text[start : start + self._longest][::-1], self._endings):
                ranges.append((start, start + length))
        return ranges

    def _length(self, text: str, spellings: Sequence[str]) -> int:
        """The length of the longest end of a text with which a longer spelling begins."""
        for length in range(len(text), 0, -1):
            part = text[-length:]
            for spelling in spellings[(index := bisect_left(spellings, part)) : index + 2]:
                if len(spelling) > length and spelling.startswith(part):
                    return length
        return 0


@lru_cache(maxsize=8)
def spelling_parts(spellings: frozenset[str]) -> SpellingParts:
    """Return the finder for some spellings. It is made once and cached."""
    return SpellingParts(spellings)


def merged_ranges(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield ranges without overlaps, ascending."""
    start = end = -1
    for first, last in sorted(ranges):
        if first > end:
            if end >= 0:
                yield start, end
            start, end = first, last
        end = max(end, last)
    if end >= 0:
        yield start, end
