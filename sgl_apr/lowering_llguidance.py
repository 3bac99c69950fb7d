"""Rules as llguidance's Lark: tags as token ids or spelled out; text is one lexeme up to what ends it."""

from __future__ import annotations

import json
import re

from sgl_apr.errors import GrammarError
from sgl_apr.grammar import TEXT, Literal
from sgl_apr.lowering import Item, Mark, Ref, Writer


class LlguidanceWriter(Writer):
    """Lowering in both tag modes."""

    def fixed(self, text: str) -> str:
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
        following = next((i for i in rest if not isinstance(i, Mark)), None)
        pattern = self.grammar.terminals[TEXT]
        if most or self.shape.plain:  # without `<` in it, text ends by itself where a tag begins
            name = f"{'LINE' if line else 'LEAD'}_{most}" if most else "PLAIN"
            character = "[^<\\n]" if most and line else "[^<]"
            self.lines[name] = f"/{pattern}/ & /{character}{f'{{1,{most}}}' if most else '+'}/"
            return name + "?" * optional
        if (
            following is None
            or isinstance(following, Ref)
            or (isinstance(following, Literal) and self.token(following.text) is not None)
        ):
            self.lines[TEXT] = f"/{pattern}/ & ~/(.|\\n)*{self.near_tag}(.|\\n)*/"
            return TEXT + "?" * optional
        if not (isinstance(following, Literal) and following.is_tag):
            raise GrammarError(
                f"{self.grammar.name}: {TEXT} must be followed by a tag or the end, not {following}"
            )
        rest.remove(following)
        tag, body = _regex(following.text), f"({pattern}){'?' * optional}"
        rule = f"/{body}{tag}/ & ~/(.|\\n)*{self.near_tag}(.|\\n)*{tag}/"
        known = [name for name, line_ in self.lines.items() if line_ == rule]
        name = known[0] if known else f"UNTIL_{len(self.lines)}"
        self.lines[name] = rule
        return name

    @property
    def near_tag(self) -> str:
        """A regular expression for the beginning of a tag or what would pass for one, in any case."""
        return rf"<\/?(?i:{'|'.join(map(_regex, self.names))})"


def _regex(text: str) -> str:
    return re.escape(text).replace("/", "\\/").replace('\\"', '"')
