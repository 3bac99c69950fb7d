"""Rules as xgrammar's EBNF: tags as token ids only, since it has no way to end free text at a tag that is spelled out."""

from __future__ import annotations

import json
import re

from sgl_apr.errors import GrammarError
from sgl_apr.formats.grammar import TEXT
from sgl_apr.formats.lark_ast import StringLiteral
from sgl_apr.formats.masks.free_text import ANY_TEXT, text_excluding
from sgl_apr.formats.masks.writer import GrammarWriter, Item, RuleMarker


class XgrammarWriter(GrammarWriter):
    """Lowering for tokenizers that have every tag of the dialect as one token.

    xgrammar matches an added token by its spelling, so text without the spelling of a tag is without the tag.
    """

    DEFINES = " ::= "
    START = "root"

    def literal(self, text: str) -> str:
        token = self.token(text)
        if token is None and StringLiteral(text).is_tag:
            raise GrammarError(
                f"{self.grammar.name}: {text} is not one token of this tokenizer, which xgrammar needs to end free "
                "text at it; expected a tokenizer with the dialect's tags, or --grammar-backend llguidance"
            )
        if token is None:
            return json.dumps(text, ensure_ascii=False)
        # Up to xgrammar 0.2.7 the compiler's cache takes grammars for the same that differ in token ids
        # alone, and gives one the masks of the other. A rule that can never end tells them apart.
        self.lines[f"never_{token}"] = f'never_{token} "{token}"'
        self.lines[f"tag_{token}"] = f"Token({token}) | never_{token}"
        return f"tag_{token}"

    def pattern(self, name: str, regex: str) -> str:
        self.lines[name] = _ebnf(regex)
        return name

    def text(
        self, rest: list[Item], *, optional: bool = False, most: int | None = None, line: bool = False
    ) -> str:
        following = next((i for i in rest if not isinstance(i, RuleMarker)), None)
        if isinstance(following, StringLiteral):
            self.literal(following.text)
        if most or self.shape.forbid_angle_brackets:
            name = f"{'LINE' if line else 'LEAD'}_{most}" if most else "PLAIN"
            character = "[^<\\n]" if most and line else "[^<]"
            self.lines[name] = f"{character}{f'{{1,{most}}}' if most else '+'}"
            return name + "?" * optional
        if self.grammar.terminals[TEXT] != ANY_TEXT:
            raise GrammarError(f"{self.grammar.name}: xgrammar takes a TEXT of /{ANY_TEXT}/ only")
        # With the control tokens of chat models, `<|...`, which it would match by their spelling as well.
        self.lines["TEXT"] = (
            f"Regex({json.dumps(text_excluding([*self.tag_names, '|']), ensure_ascii=False)})"
        )
        return "TEXT" + "?" * optional


def _ebnf(regex: str) -> str:
    """A regular expression of the shared subset as an EBNF expression: literal characters are quoted."""
    pieces = re.findall(r"\[(?:\\.|[^\]\\])*\]|\{[\d,]+\}|\\.|[()|*+?]|[^()|*+?\[\]{}\\]", regex)
    return (
        " ".join(p if p[0] in "[{()|*+?" else json.dumps(p[-1] if p[0] == "\\" else p) for p in pieces)
        .replace(" {", "{")
        .replace(" *", "*")
        .replace(" +", "+")
        .replace(" ?", "?")
    )
