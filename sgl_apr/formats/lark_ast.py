"""The expressions of a .lark file, and the transformer that makes them from Lark's own syntax tree."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lark import Token, Transformer, Tree
from lark.exceptions import LarkError
from lark.load_grammar import eval_escaping

from sgl_apr.errors import GrammarError


@dataclass(frozen=True, slots=True)
class StringLiteral:
    """Fixed text."""

    text: str

    @property
    def is_tag(self) -> bool:
        """Whether it is a tag, or the beginning of one that a number or a name completes (`<FORK-`)."""
        return re.fullmatch(r"</?[A-Za-z][^<>]*>?", self.text) is not None


@dataclass(frozen=True, slots=True)
class SymbolRef:
    """A reference to a rule (lower case) or to a terminal (upper case)."""

    name: str


@dataclass(frozen=True, slots=True)
class SequenceExpr:
    """Items in sequence."""

    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """Alternatives, one of which is taken."""

    options: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """A repetition: `?`, `*` or `+`.

    Attributes:
        item: What is repeated.
        min_count: 0 or 1.
        unbounded: Whether it can occur more than once (`*` and `+`).
    """

    item: Expr
    min_count: int
    unbounded: bool


Expr = StringLiteral | SymbolRef | SequenceExpr | Alt | Repeat


@dataclass(frozen=True, slots=True)
class Regex:
    """A terminal that is a regular expression."""

    pattern: str


class ExpressionTransformer(Transformer[Token, Expr]):
    """Turns Lark's syntax tree of a grammar file into expressions.

    Raises `GrammarError` for everything outside of the subset that Lark, llguidance and xgrammar share.
    """

    def literal(self, children: list[Token]) -> Expr | Regex:
        token = children[0]
        if token.startswith('"') and token.endswith('"'):
            return StringLiteral(string_value(token))
        if token.startswith("/") and token.endswith("/"):
            if re.search(r"\(\?[=!<]", token):
                raise GrammarError(f"look-around in {token[:60]} is not supported")
            return Regex(str(token)[1:-1])
        raise GrammarError(f"flags in {token} are not supported")

    def name(self, children: list[Token]) -> Expr:
        return SymbolRef(str(children[0]))

    def value(self, children: list[Expr]) -> Expr:
        return children[0]

    def expr(self, children: list[Expr | Token | None]) -> Expr:
        item, operator, *rest = children
        if operator is None:
            return _expr(item)
        if any(r is not None for r in rest):
            raise GrammarError("`~` counts are not supported, expected ?, * or +")
        return Repeat(_expr(item), min_count=int(operator == "+"), unbounded=operator != "?")

    def maybe(self, children: list[Expr]) -> Expr:
        return Repeat(children[0], min_count=0, unbounded=False)

    def expansion(self, children: list[Expr]) -> Expr:
        items: list[Expr] = []
        for child in (c for c in children if c is not None):
            items += child.items if isinstance(child, SequenceExpr) else (child,)
        return items[0] if len(items) == 1 else SequenceExpr(tuple(items))

    def alias(self, children: list[Expr | None]) -> Expr:
        if len(children) > 1 and children[1] is not None:
            raise GrammarError("aliases (->) are not supported")
        return _expr(children[0])

    def expansions(self, children: list[Expr]) -> Expr:
        return Alt(tuple(children)) if len(children) > 1 else children[0]

    def __default__(self, data: str, children: list[Expr], meta: object) -> Expr:
        raise GrammarError(f"{data} is not supported")


def string_value(token: Token) -> str:
    """Return the text of a string in a grammar file, with the escape sequences that Lark knows.

    Raises:
        GrammarError: The string is empty, or has an escape sequence that is not valid.
    """
    try:
        text = str(eval_escaping(token[1:-1])).replace("\\\\", "\\")
    except (LarkError, ValueError):
        raise GrammarError(f"{token[:60]} has an escape sequence that is not valid") from None
    if not text:
        raise GrammarError('an empty string "" is not supported, expected ? after what can be missing')
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise GrammarError(f"{token[:60]} has half of a surrogate pair, which UTF-8 cannot encode")
    return text


def is_present(child: Tree[Token] | Token | None) -> bool:
    """Whether the file has an optional part of a rule's head (modifier, parameters, priority)."""
    return any(map(is_present, child.children)) if isinstance(child, Tree) else child is not None


def _expr(item: object) -> Expr:
    if isinstance(item, (StringLiteral, SymbolRef, SequenceExpr, Alt, Repeat, Regex)):
        return item  # type: ignore[return-value]  # a Regex only occurs as a complete terminal
    raise GrammarError(f"{item} is not supported")
