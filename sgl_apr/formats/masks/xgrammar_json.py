"""Rules of xgrammar for JSON that fits a schema, in which no string holds a tag."""

from __future__ import annotations

import json
import re
from functools import lru_cache

from sgl_apr.errors import GrammarError, UnsupportedEngine
from sgl_apr.formats.masks.free_text import value_excluding

STRING_TEXT = "json_string_text"  # the rule of the inside of a string, which all schemas of a mask share
# Strings, character classes, and names outside of both.
_TOKENS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[A-Za-z_]\w*')
_ANY_CHARACTER = r"[^\"\\\r\n]"  # how xgrammar writes a character of a string with a maximal length
_TAGLESS_CHARACTER = r"[^\0-\x1f\"\\<]"


def first_line(error: RuntimeError) -> str:
    """Return the message of an error of xgrammar, without the time and the place in its source."""
    return re.sub(r"^\[[0-9:]+\] \S+ ", "", str(error).split("\n")[0])


@lru_cache(maxsize=256)
def json_rules(schema: str, prefix: str, excluded: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return rules as (name, body) pairs.

    xgrammar converts the schema. Its rules for characters of strings are replaced by those that exclude tags.

    Args:
        schema: The schema, as JSON text.
        prefix: The name of the rule of the value, with which the names of the others begin.
        excluded: The names of the tags, without brackets.

    Raises:
        GrammarError: xgrammar cannot convert the schema.
        UnsupportedEngine: xgrammar is not installed.
    """
    try:
        from xgrammar import Grammar
    except ImportError as error:
        raise UnsupportedEngine(
            f"tools with the grammar backend xgrammar need it here: pip install xgrammar ({error})"
        ) from error
    try:
        text = str(Grammar.from_json_schema(schema, any_whitespace=False))
    except RuntimeError as error:
        raise GrammarError(f"xgrammar cannot convert the schema: {first_line(error)}") from None
    rules = dict(line.split(" ::= ", 1) for line in text.splitlines() if " ::= " in line)
    inside = json.dumps(value_excluding(excluded, in_json=True), ensure_ascii=False)
    rules["basic_string_sub"] = f'{STRING_TEXT} "\\""'
    names = {name: prefix if name == "root" else f"{prefix}_{name}" for name in rules}
    pending, written = ["root"], dict[str, str]()
    while pending:  # only the rules that the value needs
        name = pending.pop()
        if names[name] not in written:
            used = [m[0] for m in _TOKENS.finditer(rules[name]) if m[0] in rules]
            pending += used
            body = rules[name].replace(_ANY_CHARACTER, _TAGLESS_CHARACTER)
            written[names[name]] = _TOKENS.sub(lambda m: names.get(m[0], m[0]), body)
    if any(STRING_TEXT in body for body in written.values()):
        written[STRING_TEXT] = f"Regex({inside})"
    return tuple(written.items())
