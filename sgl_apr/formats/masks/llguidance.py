"""Writes rules for llguidance, in its dialect of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from sgl_apr.errors import GrammarError
from sgl_apr.formats.grammar import TEXT
from sgl_apr.formats.lark_ast import StringLiteral
from sgl_apr.formats.masks.free_text import ANY_TEXT, SPACES, value_excluding
from sgl_apr.formats.masks.json_schema import first_characters
from sgl_apr.formats.masks.writer import GrammarWriter, Item, RuleMarker, TextLimits

# The slices that llguidance precomputes: sets of tokens that are allowed as a whole in most places. Its own are
# made for JSON strings. Without `<`, with which tags begin, they fit free text.
LLGUIDANCE_SLICES = (
    r'[^"\\\x00-\x1F\x7F<]{1,10}',
    r'[^"\\\x00-\x1F\x7F<]{1,30}',
    r'[^"\\\x00-\x1F\x7F<]+',
    r"[^<]+",
)

# JSON without optional white space, of which a model could write any amount.
JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class LlguidanceWriter(GrammarWriter):
    """Writes a tag as its token if it is one, and spells it out if it is not."""

    BACKEND = "llguidance"

    def literal(self, text: str) -> str:
        token = self.token(text)
        return self.plain(text) if token is None else self.token_symbol(token)

    def token_symbol(self, token: int) -> str:
        return f"<[{token}]>"

    def json_value(self, name: str, schema: Mapping[str, Any]) -> str:
        value = {**schema, "x-guidance": JSON_LAYOUT}
        self.lines[name] = f"%json {json.dumps(value, ensure_ascii=False)}"
        return name

    @cached_property
    def string_pattern(self) -> str:
        return f"^{value_excluding(self.excluded_names)}$"

    def parameter_text(self, name: str, end: str, limits: TextLimits) -> list[str]:
        """Return one symbol, since a lexeme has no look-ahead, and those of the tokens from the first one on."""
        fixed = self.fixed(end)
        spelled = json.loads(fixed[0])
        tail = _escape(spelled)
        rules = [value_excluding(self.excluded_names) + tail]
        if limits.min_chars or limits.max_chars is not None:
            longest = "" if limits.max_chars is None else limits.max_chars
            rules.append(rf"(.|\n){{{limits.min_chars},{longest}}}{tail}")
        if limits.pattern is not None:
            rules.append(f"({limits.pattern}){tail}")
        if limits.trimmed:
            rules.append(rf"[^{SPACES}]((.|\n)*[^{SPACES}])?{tail}")
        return [self.lexeme(name.upper(), " & ".join(f"/{rule}/" for rule in rules)), *fixed[1:]]

    def lexeme(self, name: str, body: str) -> str:
        """Write a lexeme, and return its name. One that is there already is not written again."""
        same = [other for other, rule in self.lines.items() if rule == body]
        if not same:
            self.lines[name] = body
        return same[0] if same else name

    def pattern(self, name: str, regex: str) -> str:
        self.lines[name] = f"/{regex}/"
        return name

    def text(
        self,
        rest: list[Item],
        *,
        optional: bool = False,
        max_chars: int | None = None,
        single_line: bool = False,
    ) -> str:
        """Return the symbol of free text, together with a spelled tag that follows it.

        A lexeme has no look-ahead, so text and the spelled tag that ends it are one lexeme. The tag is removed
        from `rest`.
        """
        following = next((i for i in rest if not isinstance(i, RuleMarker)), None)
        spelled = isinstance(following, StringLiteral) and self.token(following.text) is None
        if spelled and following == StringLiteral(self.trigger or "") and not following.text.startswith("<"):
            raise GrammarError(
                f"{self.grammar.name}: calls begin with {following.text}, which is not one token of this tokenizer"
            )
        if (
            max_chars or self.options.forbid_angle_brackets
        ):  # text without `<` ends by itself where a tag begins
            name = f"{'LINE' if single_line else 'LEAD'}_{max_chars}" if max_chars else "PLAIN"
            character = "[^<\\n]" if max_chars and single_line else "[^<]"
            count = f"{{1,{max_chars}}}" if max_chars else "+"
            self.lines[name] = f"/{character}{count}/{self.text_constraint}{self.no_answer}"
            return name + "?" * optional
        if following is None or (
            isinstance(following, StringLiteral) and self.token(following.text) is not None
        ):
            self.lines[TEXT] = f"/{self.free_text}/{self.text_constraint}{self.no_answer}"
            return TEXT + "?" * optional
        if not (isinstance(following, StringLiteral) and self.is_tag(following.text)):
            raise GrammarError(
                f"{self.grammar.name}: {following} follows {TEXT}, expected a tag or the end of the rule"
            )
        rest.remove(following)
        rule = f"/({self.free_text}){'?' * optional}{_escape(following.text)}/"
        if self.text_constraint:
            pattern = self.grammar.terminals[TEXT]
            rule += f" & /({pattern}){'?' * optional}{_escape(following.text)}/"
        rule += self.no_answer
        return self.lexeme(f"UNTIL_{len(self.lines)}", rule)

    @property
    def text_constraint(self) -> str:
        """What the TEXT of the dialect requires in addition; empty if it matches any text."""
        pattern = self.grammar.terminals[TEXT]
        return "" if pattern == ANY_TEXT else f" & /{pattern}/"

    @cached_property
    def free_text(self) -> str:
        """A regular expression for text without a tag and without anything that resembles one (`tag_names`)."""
        return self.text_pattern(self.excluded_names)

    @property
    def no_answer(self) -> str:
        """Keeps text apart from a JSON answer that can stand in its place, since a lexer cannot follow both."""
        schema = self.options.answer_schema
        return "" if schema is None else f" & /[^{first_characters(schema)}](.|\n)*/"


def _escape(text: str) -> str:
    return re.escape(text).replace("\\\n", "\\n").replace("/", "\\/").replace('\\"', '"')
