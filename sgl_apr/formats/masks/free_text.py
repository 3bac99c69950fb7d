"""Regular expressions for free text that contains no tag."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

ANY_TEXT = r"(.|\n)+"
SLASH = r"\/"


# The characters that `str.strip` removes, for a character class.
SPACES = r"\x09-\x0d\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# A character of a JSON string that is written as an escape, without halves of surrogate pairs.
JSON_ESCAPE = r'\\(["\\\/bfnrt]|u([0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}))'


class TextParts(NamedTuple):
    """Regular expressions that text without tags consists of: `(character | leaving)* staying`.

    Attributes:
        character: A character other than `<`.
        leaving: `<`, and what follows until it is clear that it begins no tag.
        staying: Any number of beginnings of tags, with which a text can end.
    """

    character: str
    leaving: str
    staying: str


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
    leaving, staying = [], []

    def visit(node: dict[str, Any], prefix: str) -> None:
        following = [c for c in node if c]
        if prefix:
            leaving.append(f"{prefix}[^<{''.join(map(_both_cases, following))}]")
            staying.append(prefix)
        for character in following:
            if "" not in node[character]:  # otherwise the name is complete there
                visit(node[character], prefix + f"[{_both_cases(character)}]")

    trie = _trie(names)
    visit(trie, "")
    first = "".join(map(_both_cases, (c for c in trie if c)))
    left = "|".join(
        [rf"[^<\/{first}]", rf"\/[^<{first}]", *([rf"\/?({'|'.join(leaving)})"] if leaving else [])]
    )
    stays = rf"<\/?({'|'.join(staying)})?" if staying else r"<\/?"
    return rf"([^<]|({stays})*<({left}))+({stays})*"


def value_excluding(names: Sequence[str], *, in_json: bool = False) -> str:
    """Return a regular expression like `text_excluding` for a value, which can be empty, or `<` alone.

    Args:
        names: The names of the tags, without brackets.
        in_json: Whether it is the inside of a JSON string, in which some characters are written as escapes.
    """
    parts = text_parts(names, in_json=in_json)
    return rf"({parts.character}|{parts.leaving})*{parts.staying}"


def text_parts(names: Sequence[str], *, in_json: bool = False) -> TextParts:
    """Return the parts of text in which no name follows `<` or `</`, in any case. They are short for long names.

    Args:
        names: The names of the tags, without brackets.
        in_json: Whether the text is the inside of a JSON string, in which some characters are written as escapes.
    """

    def other(excluded: str) -> str:
        """Any character except some."""
        return f'[^"\\\\\\x00-\\x1f{excluded}]|{JSON_ESCAPE}' if in_json else f"[^{excluded}]"

    def leaves(node: dict[str, Any]) -> str:
        """What leaves the names from a node on."""
        return "|".join([other("<" + first_characters(node)), *steps(node, leaves)])

    def stays(node: dict[str, Any]) -> str:
        """What stays in the names from a node on."""
        inner = "|".join(steps(node, stays))
        return f"({inner})?" if inner else ""

    def steps(node: dict[str, Any], rest: Callable[[dict[str, Any]], str]) -> list[str]:
        incomplete = {c: child for c, child in node.items() if c and "" not in child}
        return [f"[{_both_cases(c)}]({rest(child)})" for c, child in incomplete.items()]

    def first_characters(node: dict[str, Any]) -> str:
        return "".join(_both_cases(c) for c in node if c)

    trie = _trie(names)
    first = first_characters(trie)
    begun = rf"|\/?({'|'.join(inside)})" if (inside := steps(trie, leaves)) else ""
    beginning = rf"(<\/?{stays(trie)})*"
    leaving = rf"{beginning}<({other('<' + SLASH + first)}|\/({other('<' + first)}){begun})"
    return TextParts(f"({other('<')})", leaving, beginning)


def _trie(names: Sequence[str]) -> dict[str, Any]:
    """The names by their characters. A name is complete where there is an empty key."""
    trie: dict[str, Any] = {}
    for name in names:
        node = trie
        for character in name.lower():
            node = node.setdefault(character, {})
        node[""] = True
    return trie


def _both_cases(character: str) -> str:
    """A character in both cases, for a character class."""
    cases = dict.fromkeys((character.lower(), character.upper()))
    return "".join(f"\\{c}" if c in r"\/]^-[" else c for c in cases if len(c) == 1)
