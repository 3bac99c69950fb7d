"""Rules as llguidance's Lark: tags as token ids or spelled out; text is one lexeme up to what ends it."""

from __future__ import annotations

import json
import re
from functools import cached_property

from sgl_apr.errors import GrammarError
from sgl_apr.formats.grammar import TEXT
from sgl_apr.formats.lark_ast import StringLiteral
from sgl_apr.formats.masks.free_text import ANY_TEXT, text_excluding
from sgl_apr.formats.masks.writer import GrammarWriter, Item, RuleMarker

# What llguidance is to prepare for: sets of tokens that are allowed as a whole in most places. Its own begin
# with text for JSON; without `<` in them they fit free text, which is what tags begin with.
LLGUIDANCE_SLICES = (
    r'[^"\\\x00-\x1F\x7F<]{1,10}',
    r'[^"\\\x00-\x1F\x7F<]{1,30}',
    r'[^"\\\x00-\x1F\x7F<]+',
    r"[^<]+",
)


class LlguidanceWriter(GrammarWriter):
    """Lowering in both tag modes."""

    def literal(self, text: str) -> str:
        token = self.token(text)
        return json.dumps(text, ensure_ascii=False) if token is None else f"<[{token}]>"

    def pattern(self, name: str, regex: str) -> str:
        self.lines[name] = f"/{regex}/"
        return name

    def text(
        self, rest: list[Item], *, optional: bool = False, most: int | None = None, line: bool = False
    ) -> str:
        """A tag that is spelled out is taken off `rest` and read with the text before it.

        A lexeme has no look-ahead, so text that ends at a spelled tag is one lexeme with it.
        """
        following = next((i for i in rest if not isinstance(i, RuleMarker)), None)
        if (
            most or self.shape.forbid_angle_brackets
        ):  # without `<` in it, text ends by itself where a tag begins
            name = f"{'LINE' if line else 'LEAD'}_{most}" if most else "PLAIN"
            character = "[^<\\n]" if most and line else "[^<]"
            self.lines[name] = f"/{character}{f'{{1,{most}}}' if most else '+'}/{self.only}"
            return name + "?" * optional
        if following is None or (
            isinstance(following, StringLiteral) and self.token(following.text) is not None
        ):
            self.lines[TEXT] = f"/{self.free}/{self.only}"
            return TEXT + "?" * optional
        if not (isinstance(following, StringLiteral) and following.is_tag):
            raise GrammarError(
                f"{self.grammar.name}: {TEXT} must be followed by a tag or the end, not {following}"
            )
        rest.remove(following)
        rule = f"/({self.free}){'?' * optional}{_regex(following.text)}/"
        if self.only:
            pattern = self.grammar.terminals[TEXT]
            rule += f" & /({pattern}){'?' * optional}{_regex(following.text)}/"
        known = [name for name, written in self.lines.items() if written == rule]
        name = known[0] if known else f"UNTIL_{len(self.lines)}"
        self.lines[name] = rule
        return name

    @property
    def only(self) -> str:
        """What a dialect's own TEXT adds: nothing if it is any text."""
        pattern = self.grammar.terminals[TEXT]
        return "" if pattern == ANY_TEXT else f" & /{pattern}/"

    @cached_property
    def free(self) -> str:
        """A regular expression for text without a tag or what would pass for one (`names`, in any case)."""
        return text_excluding(self.tag_names)


def _regex(text: str) -> str:
    return re.escape(text).replace("/", "\\/").replace('\\"', '"')
