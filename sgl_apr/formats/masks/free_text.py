"""Regular expressions for free text that contains no tag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ANY_TEXT = r"(.|\n)+"


def text_excluding(names: Sequence[str]) -> str:
    r"""Return a regular expression for text in which no name follows `<` or `</`, in any case.

    The text has at least one character, and does not only consist of the beginnings of tags.

    The expression is written positively: after `<` the text follows the names and then leaves them, or another
    `<` follows, or the text ends. `~/.*<name.*/` is shorter, but hides from llguidance that all tokens without
    `<` are allowed, so that it checks every token of the vocabulary: 0.3 ms for each text that begins, instead of
    0.05 ms.

    Args:
        names: The names of the tags, without brackets.
    """
    trie: dict[str, Any] = {}
    for name in names:
        node = trie
        for character in name.lower():
            node = node.setdefault(character, {})
        node[""] = True
    leaving, staying = [], []

    def visit(node: dict[str, Any], prefix: str) -> None:
        following = [c for c in node if c]
        if prefix:
            leaving.append(f"{prefix}[^<{''.join(map(_both_cases, following))}]")
            staying.append(prefix)
        for character in following:
            if "" not in node[character]:  # otherwise the name is complete there
                visit(node[character], prefix + f"[{_both_cases(character)}]")

    visit(trie, "")
    first = "".join(map(_both_cases, (c for c in trie if c)))
    left = "|".join(
        [rf"[^<\/{first}]", rf"\/[^<{first}]", *([rf"\/?({'|'.join(leaving)})"] if leaving else [])]
    )
    stays = rf"<\/?({'|'.join(staying)})?" if staying else r"<\/?"
    return rf"([^<]|({stays})*<({left}))+({stays})*"


def _both_cases(character: str) -> str:
    """A character in both cases, for a character class."""
    cases = dict.fromkeys((character.lower(), character.upper()))
    return "".join(f"\\{c}" if c in r"\/]^-[" else c for c in cases if len(c) == 1)
