"""The items of a .lark file, and Lark's own syntax tree read as them; what they mean is in grammar.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from lark import Lark, Token, Transformer, Tree

from sgl_apr.errors import GrammarError


@dataclass(frozen=True, slots=True)
class StringLiteral:
    """Fixed text."""

    text: str

    @property
    def is_tag(self) -> bool:
        """Whether it is a tag, or the beginning of one that a number or a name ends: `<FORK-`."""
        return re.fullmatch(r"</?[A-Za-z][^<>]*>?", self.text) is not None


@dataclass(frozen=True, slots=True)
class SymbolRef:
    """A reference to a rule (lower case) or to a terminal (upper case)."""

    name: str


@dataclass(frozen=True, slots=True)
class SequenceExpr:
    """Items one after another."""

    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """One of several."""

    options: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`?` (0 or 1), `*` (0 or more) or `+` (1 or more)."""

    item: Expr
    low: int
    many: bool


Expr = StringLiteral | SymbolRef | SequenceExpr | Alt | Repeat


@dataclass(frozen=True, slots=True)
class Regex:
    """The whole of a terminal that is a regular expression."""

    pattern: str


class ExpressionTransformer(Transformer[Token, Expr]):
    """Lark's own syntax tree of a file to expressions."""

    def literal(self, children: list[Token]) -> Expr | Regex:
        token = children[0]
        if token.startswith('"') and token.endswith('"'):
            return StringLiteral(_unescape(str(token)[1:-1]))
        if token.startswith("/") and token.endswith("/"):
            if re.search(r"\(\?[=!<]", token):
                raise GrammarError(f"look-around in {token} is outside the shared subset")
            return Regex(str(token)[1:-1])
        raise GrammarError(f"flags in {token} are outside the shared subset")

    def name(self, children: list[Token]) -> Expr:
        return SymbolRef(str(children[0]))

    def value(self, children: list[Expr]) -> Expr:
        return children[0]

    def expr(self, children: list[Expr | Token | None]) -> Expr:
        item, operator, *rest = children
        if operator is None:
            return _expr(item)
        if any(r is not None for r in rest):
            raise GrammarError("`~` counts are outside the shared subset, expected ?, * or +")
        return Repeat(_expr(item), low=int(operator == "+"), many=operator != "?")

    def maybe(self, children: list[Expr]) -> Expr:
        return Repeat(children[0], low=0, many=False)

    def expansion(self, children: list[Expr]) -> Expr:
        items = tuple(c for c in children if c is not None)
        return items[0] if len(items) == 1 else SequenceExpr(items)

    def alias(self, children: list[Expr | None]) -> Expr:
        if len(children) > 1 and children[1] is not None:
            raise GrammarError("aliases (->) are outside the shared subset")
        return _expr(children[0])

    def expansions(self, children: list[Expr]) -> Expr:
        return Alt(tuple(children)) if len(children) > 1 else children[0]

    def __default__(self, data: str, children: list[Expr], meta: object) -> Expr:
        raise GrammarError(f"{data} is outside the shared subset")


def is_present(child: Tree[Token] | Token | None) -> bool:
    """Whether an optional part of a rule's head (modifier, parameters, priority) was written."""
    return any(map(is_present, child.children)) if isinstance(child, Tree) else child is not None


def _expr(item: object) -> Expr:
    if isinstance(item, (StringLiteral, SymbolRef, SequenceExpr, Alt, Repeat, Regex)):
        return item  # type: ignore[return-value]  # a Regex is only ever the whole of a terminal
    raise GrammarError(f"{item} is outside the shared subset")


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t", "r": "\r"}.get(m[1], m[1]), text)


@lru_cache(maxsize=1)
def lark_meta_parser() -> Lark:
    """Lark's own grammar of its grammar files."""
    return Lark.open_from_package("lark", "lark.lark", ["grammars"], parser="lalr", propagate_positions=True)
