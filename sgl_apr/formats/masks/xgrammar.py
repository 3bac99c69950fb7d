"""Writes rules for xgrammar, in its EBNF.

It supports tags that are single tokens only: xgrammar cannot end free text at a tag that is spelled out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sgl_apr.errors import GrammarError
from sgl_apr.formats.grammar import TEXT
from sgl_apr.formats.lark_ast import StringLiteral
from sgl_apr.formats.masks.free_text import ANY_TEXT, text_parts
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
        elif limits.max_chars is not None or limits.min_chars:
            self.lines[name] = _limited_text(limits)
        else:
            end_of_text = text_parts(self.excluded_names).staying.removesuffix("*") + "+"
            self.lines["TEXT_END"] = f"Regex({json.dumps(end_of_text, ensure_ascii=False)})"
            self.lines[name] = f'"" | {self._free_text()} | TEXT_END'
        return [name, *self.fixed(end)]

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
        return self._free_text() + "?" * optional

    def _free_text(self) -> str:
        """Write the rule of text without tags, and return its symbol."""
        # `|` excludes the control tokens of chat models, `<|...`, which xgrammar would match by their spelling, too.
        names = dict.fromkeys([*self.excluded_names, "|"])
        self.lines[TEXT] = f"Regex({json.dumps(self.text_pattern(list(names)), ensure_ascii=False)})"
        return TEXT


def _limited_text(limits: TextLimits) -> str:
    """An expression for text of some length without `<`."""

    def count(used: int) -> str:
        longest = "" if limits.max_chars is None else limits.max_chars - used
        return f"[^<]{{{max(limits.min_chars - used, 0)},{longest}}}"

    if not limits.trimmed:
        return count(0)
    end = "[!-;=-~]"  # xgrammar fails at classes that exclude some characters beyond ASCII
    longer = f"{end} {count(2)} {end}" if limits.max_chars is None or limits.max_chars > 1 else ""
    return " | ".join(e for e in (end if limits.min_chars == 1 else "", longer) if e)


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
