"""Regular expressions for text without tags, compared with a search for tags."""

from __future__ import annotations

import json
import random
import re

import pytest

from sgl_apr.formats.masks.free_text import text_excluding, text_parts, value_excluding

NAMES = ["Thread", "The", "tool_call", "to", "|", "\uff5c", "</x".strip("</")]
PIECES = [
    "<",
    "</",
    "/",
    "t",
    "T",
    "h",
    "he",
    "o",
    "ool_call",
    "r",
    "x",
    " ",
    ">",
    "|",
    "\uff5c",
    "ä",
    "\\",
    '"',
    "\n",
    "\\n",
]
TAG = re.compile("</?(?:" + "|".join(map(re.escape, NAMES)) + ")", re.IGNORECASE)


def texts() -> list[str]:
    source = random.Random(7)
    return [
        "",
        "<",
        "</",
        "<<",
        *("".join(source.choices(PIECES, k=source.randint(1, 7))) for _ in range(6000)),
    ]


def is_json_string(text: str) -> bool:
    try:
        return isinstance(json.loads(f'"{text}"'), str)
    except ValueError:
        return False


@pytest.mark.parametrize("in_json", [False, True])
def test_a_value_is_any_text_without_tags(in_json: bool):
    pattern = re.compile(value_excluding(NAMES, in_json=in_json))
    for text in texts():
        expected = TAG.search(text) is None and (not in_json or is_json_string(text))
        assert (pattern.fullmatch(text) is not None) is expected, text


def test_the_short_form_matches_the_same_text():
    long, parts = re.compile(text_excluding(NAMES)), text_parts(NAMES)
    short = re.compile(f"({parts.character}|{parts.leaving})+{parts.staying}")
    assert len(short.pattern) < len(long.pattern)
    for text in texts():
        assert bool(short.fullmatch(text)) is bool(long.fullmatch(text)), text
