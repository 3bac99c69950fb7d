"""Writes rules for xgrammar, in its EBNF.

It supports tags that are single tokens only: xgrammar cannot end free text at a tag that is spelled out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sgl_apr.errors import GrammarError
from sgl_apr.formats.grammar import TEXT
from sgl_apr.formats.lark_ast import StringLiteral
from sgl_apr.formats.masks.free_text import ANY_TEXT, TextParts, text_excluding, text_parts
from sgl_apr.formats.masks.writer import GrammarWriter, Item, RuleMarker, TextLimits
from sgl_apr.formats.masks.xgrammar_json import json_rules


class XgrammarWriter(GrammarWriter):
    """Writes every tag as its token.

    xgrammar matches an added token by its spelling, so text without the spelling of a tag is without the tag.
    """

    BACKEND = "xgrammar"
    DEFINES = " ::= "
    START = "root"

    def literal(self, text: str) -> str:
        if text == self.trigger and not text.startswith("<"):
            raise GrammarError(
                f"{self.grammar.name}: calls begin with {text}, which xgrammar cannot keep out of free text; "
                "expected --grammar-backend llguidance"
            )
        token = self.token(text)
        if token is None and self.is_tag(text) and text != self.trigger:
            raise GrammarError(
                f"{self.grammar.name}: {text} is not one token of this tokenizer, which xgrammar needs to end free "
                "text at it; expected a tokenizer with the dialect's tags, or --grammar-backend llguidance"
            )
        if token is None:
            return self.plain(text)
        return self.token_symbol(token)

    def token_symbol(self, token: int) -> str:
        # Up to xgrammar 0.2.7 the compiler's cache confuses grammars that differ only in token ids, and returns the
        # masks of the wrong one. A rule that can never match makes them different.
        self.lines[f"never_{token}"] = f'never_{token} "{token}"'
        self.lines[f"tag_{token}"] = f"Token({token}) | never_{token}"
        return f"tag_{token}"

    def json_value(self, name: str, schema: Mapping[str, Any]) -> str:
        self.lines.update(json_rules(json.dumps(schema), name, tuple(self.excluded_names)))
        return name

    @property
    def string_pattern(self) -> None:
        return None

    def parameter_text(self, name: str, end: str, limits: TextLimits) -> list[str]:
        if limits.pattern is not None:
            self.lines[name] = f"Regex({json.dumps(limits.pattern, ensure_ascii=False)})"
            return [name, *self.fixed(end)]
        if limits.max_chars is None and not limits.min_chars:
            self.lines.update(_text_except("null", text_parts(self.excluded_names)))
            return ["value_0?", *self.fixed(end)]
        self.lines.update(_limited_text_except("null", limits.min_chars, limits.max_chars, name))
        return [f"{name}_0", *self.fixed(end)]

    def pattern(self, name: str, regex: str) -> str:
        self.lines[name] = _to_ebnf(regex)
        return name

    def text(
        self,
        rest: list[Item],
        *,
        optional: bool = False,
        max_chars: int | None = None,
        single_line: bool = False,
    ) -> str:
        following = next((i for i in rest if not isinstance(i, RuleMarker)), None)
        if isinstance(following, StringLiteral):
            self.literal(following.text)
        if max_chars or self.options.forbid_angle_brackets:
            name = f"{'LINE' if single_line else 'LEAD'}_{max_chars}" if max_chars else "PLAIN"
            character = "[^<\\n]" if max_chars and single_line else "[^<]"
            self.lines[name] = f"{character}{f'{{1,{max_chars}}}' if max_chars else '+'}"
            return name + "?" * optional
        if self.grammar.terminals[TEXT] != ANY_TEXT:
            raise GrammarError(f"{self.grammar.name}: xgrammar supports only /{ANY_TEXT}/ as {TEXT}")
        # `|` excludes the control tokens of chat models, `<|...`, which xgrammar would match by their spelling, too.
        self.lines["TEXT"] = (
            f"Regex({json.dumps(text_excluding(list(dict.fromkeys([*self.excluded_names, '|']))), ensure_ascii=False)})"
        )
        return "TEXT" + "?" * optional


def _text_except(word: str, parts: TextParts) -> Iterator[tuple[str, str]]:
    """The rules of a text that is not one word, in any case. `value_0` is the text, if it is not empty."""

    def regex(pattern: str) -> str:
        return f"Regex({json.dumps(pattern, ensure_ascii=False)})"

    yield "value_end", regex(parts.staying.removesuffix("*") + "+")
    yield "value_leaving", regex(parts.leaving)
    yield "value_rest", regex(f"({parts.character}|{parts.leaving})*{parts.staying}")
    for index, character in enumerate(word):
        cases = character.lower() + character.upper()
        after = f"[{cases}] value_{index + 1}" + "?" * (index + 1 < len(word))
        yield f"value_{index}", f"[^<{cases}] value_rest | value_leaving value_rest | {after} | value_end"
    yield f"value_{len(word)}", "[^<] value_rest | value_leaving value_rest | value_end"


def _limited_text_except(
    word: str, min_chars: int, max_chars: int | None, name: str
) -> Iterator[tuple[str, str]]:
    """The rules of a text of some length without `<` that is not one word, in any case."""

    def rest(used: int, least: int = 0) -> str:
        """What can follow `used` characters."""
        limit = "" if max_chars is None else max_chars - used
        return f"[^<]{{{max(min_chars - used, least)},{limit}}}"

    longest = len(word) if max_chars is None else min(len(word), max_chars)
    can_be_longer = max_chars is None or max_chars > len(word)
    for index, character in enumerate(word[:longest]):
        cases = character.lower() + character.upper()
        options = ['""'] if index >= min_chars else []
        options.append(f"[^<{cases}] {rest(index + 1)}")
        if index + 1 < len(word) or can_be_longer:  # otherwise the word would be complete
            options.append(f"[{cases}] {name}_{index + 1}")
        yield f"{name}_{index}", " | ".join(options)
    yield f"{name}_{longest}", rest(longest, 1) if longest == len(word) and can_be_longer else '""'


def _to_ebnf(regex: str) -> str:
    """Convert a regular expression to an EBNF expression, in which literal characters are quoted."""
    pieces = re.findall(r"\[(?:\\.|[^\]\\])*\]|\{[\d,]+\}|\\.|[()|*+?]|[^()|*+?\[\]{}\\]", regex)
    return (
        " ".join(p if p[0] in "[{()|*+?" else json.dumps(p[-1] if p[0] == "\\" else p) for p in pieces)
        .replace(" {", "{")
        .replace(" *", "*")
        .replace(" +", "+")
        .replace(" ?", "?")
    )
