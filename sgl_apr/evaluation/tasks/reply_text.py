"""What a reply of a model says, found in linear time: a reply is untrusted, and may be long or strange."""

from __future__ import annotations

import re

_ANSWER_LINE = re.compile(r"[^\w\n]*answer[^\w\n]*:(.*)", re.IGNORECASE)
_NUMBERED_LINE = re.compile(r"\s*(\d+)[.)](.*)")
_NUMBER = re.compile(r"\d+")
MAX_DIGITS = 9  # of a number that a reply names


def answer_lines(text: str) -> list[str]:
    """What the lines that begin with "Answer:" say, without emphasis and final dots.

    A line that says nothing takes the next line that says something.

    Examples:
        >>> answer_lines("So 7 times 6.\\n**Answer:** 42.\\nAnswer:\\n\\n43")
        ['42', '43']
    """
    lines, found = text.split("\n"), list[str]()
    following = ""
    for line in reversed(lines):
        if match := _ANSWER_LINE.match(line):
            value = match[1].lstrip().lstrip("* \t") or following
            if value:
                found.append(value.rstrip(" \t*.") or value[0])
        if line.strip("* \t\r\f\v"):
            following = line.lstrip("* \t")
    return found[::-1]


def numbered_points(text: str) -> list[tuple[str, str]]:
    """Number and text of the lines that begin like "1." or "2)". A number alone takes the next line that is not blank.

    Examples:
        >>> numbered_points("1. Warm fur\\n2)\\nGood company.\\nAnd so on.")
        [('1', 'Warm fur'), ('2', 'Good company.')]
    """
    points, lines = list[tuple[str, str]](), iter(text.split("\n"))
    for line in lines:
        if match := _NUMBERED_LINE.match(line):
            point = match[2].strip() or next((rest.strip() for rest in lines if rest.strip()), "")
            if point:
                points.append((match[1], point))
    return points


def last_number_after(word: str, text: str) -> int | None:
    """The last number that has `word` between itself and the number before it, in any case.

    Examples:
        >>> last_number_after("score", "10 of them. Score: 7 or, my last score: 8. The 9th")
        8
    """
    word, text, end, number = word.lower(), text.lower(), 0, None
    for match in _NUMBER.finditer(text):
        if word in text[end : match.start()]:
            number = int(match[0][:MAX_DIGITS])
        end = match.end()
    return number


def last_between(opening: str, closing: str, text: str) -> str | None:
    """The text of the last pair of tags, without blanks around it; None without a pair.

    Examples:
        >>> last_between("<answer>", "</answer>", "<answer> 1 </answer> or <answer>2\\n3</answer>")
        '2\\n3'
    """
    found, position = None, 0
    while (start := text.find(opening, position)) >= 0:
        start += len(opening)
        if (end := text.find(closing, start)) < 0:
            break
        found, position = text[start:end].strip(), end + len(closing)
    return found
