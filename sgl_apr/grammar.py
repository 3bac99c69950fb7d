"""A dialect's .lark file as a value: its rules, its tags, its Lark parser; lowering to a mask is in lowering.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path

from lark import Lark, Token, Transformer, Tree, UnexpectedInput
from lark.exceptions import LarkError
from lark.lexer import PatternRE, TerminalDef

from sgl_apr.errors import GrammarError

TEXT = "TEXT"  # the terminal that stands for whatever the model wants to write
NUMBER = "NUMBER"  # the terminal that numbers repeated items 1..n


@dataclass(frozen=True, slots=True)
class Literal:
    """Fixed text. It is a tag if it looks like one: `<...>`."""

    text: str

    @property
    def is_tag(self) -> bool:
        return re.fullmatch(r"</?\w[^<>]*>", self.text) is not None


@dataclass(frozen=True, slots=True)
class Name:
    """A reference to a rule (lower case) or to a terminal (upper case)."""

    name: str


@dataclass(frozen=True, slots=True)
class Seq:
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


Expr = Literal | Name | Seq | Alt | Repeat


class Grammar:
    """One grammar file, in the subset that Lark, llguidance and xgrammar share.

    Rules are sequences, alternatives, `?`, `*`, `+`, string literals and terminals; terminals are a
    string or one regular expression without look-around. `TEXT` and `NUMBER` have the meanings above.
    Raises `GrammarError` with the line for anything else.
    """

    def __init__(self, source: str, name: str = "grammar") -> None:
        self.source, self.name = source, name
        self.rules: dict[str, Expr] = {}
        self.terminals: dict[str, Literal | str] = {}  # a fixed text, or a regular expression
        try:
            tree = _file_parser().parse(source if source.endswith("\n") else source + "\n")
        except UnexpectedInput as error:
            line = source.splitlines()[error.line - 1] if 0 < error.line <= source.count("\n") + 1 else ""
            raise GrammarError(f"{name}, line {error.line}: not Lark syntax: {line.strip()!r}") from None
        for item in tree.children:
            self._add(item)
        if TEXT not in self.terminals:
            raise GrammarError(f"{name}: no terminal {TEXT}, expected e.g. {TEXT} : /(.|\\n)+/")
        self._parsers: dict[str, Lark] = {}

    def _add(self, item: Tree[Token] | Token) -> None:
        line = item.meta.line if isinstance(item, Tree) else item.line
        if not isinstance(item, Tree) or item.data not in ("rule", "token"):
            what = item.data if isinstance(item, Tree) else item
            raise GrammarError(
                f"{self.name}, line {line}: {what} is outside the shared subset: rules and terminals only"
            )
        try:
            key, expr = str(item.children[0]), _Read().transform(item.children[-1])  # type: ignore[arg-type]  # always a tree
        except LarkError as error:
            cause = error.__context__ if isinstance(error.__context__, GrammarError) else error
            raise GrammarError(f"{self.name}, line {line}: {cause}") from None
        if any(_present(child) for child in item.children[1:-1]):
            raise GrammarError(
                f"{self.name}, line {line}: templates and priorities are outside the shared subset"
            )
        if item.data == "rule":
            self.rules[key] = expr
        elif isinstance(expr, (Literal, _Regex)):
            self.terminals[key] = expr if isinstance(expr, Literal) else expr.pattern
        else:
            raise GrammarError(
                f"{self.name}, line {line}: terminal {key} is not one string or one regular expression"
            )

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """Every tag, in the order in which the file mentions them."""
        found: dict[str, None] = {}

        def visit(expr: Expr) -> None:
            match expr:
                case Literal(text) if expr.is_tag:
                    found[text] = None
                case Seq(items) | Alt(items):
                    for item in items:
                        visit(item)
                case Repeat(item):
                    visit(item)

        for expr in self.rules.values():
            visit(expr)
        return tuple(found)

    def rule(self, name: str) -> Expr:
        """The body of a rule; raises `GrammarError` if the file has none of that name."""
        if name not in self.rules:
            raise GrammarError(
                f"{self.name}: no rule {name!r}, expected one of {', '.join(sorted(self.rules))}"
            )
        return self.rules[name]

    def written(self, rule: str, number: int | None = None) -> str:
        """The text of a rule that holds fixed text and at most a number: what the runtime injects."""

        def text(expr: Expr) -> str:
            match expr:
                case Literal(value):
                    return value
                case Name(name) if name == NUMBER and number is not None:
                    return str(number)
                case Name(name) if isinstance(terminal := self.terminals.get(name), Literal):
                    return terminal.text
                case Name(name) if name in self.rules:
                    return text(self.rules[name])
                case Seq(items):
                    return "".join(map(text, items))
            raise GrammarError(f"{self.name}: rule {rule!r} is to be injected and has to be fixed text")

        return text(self.rule(rule))

    def last_tag(self, rule: str) -> str:
        """The tag that a rule always ends with: where decoding of it stops."""
        expr = self.rule(rule)
        last = expr.items[-1] if isinstance(expr, Seq) else expr
        if not isinstance(last, Literal) or not last.is_tag:
            raise GrammarError(f"{self.name}: rule {rule!r} has to end with a tag")
        return last.text

    def parser(self, start: str) -> Lark:
        """The Lark parser (LALR, contextual lexer) that begins at rule `start`; TEXT ends where a tag begins."""
        if start not in self._parsers:
            self.rule(start)
            try:
                self._parsers[start] = Lark(
                    self.source,
                    parser="lalr",
                    start=start,
                    keep_all_tokens=True,
                    propagate_positions=True,
                    maybe_placeholders=False,
                    edit_terminals=self._exclude_tags,
                )
            except LarkError as error:
                raise GrammarError(f"{self.name}: {str(error).splitlines()[0]}") from error
        return self._parsers[start]

    def _exclude_tags(self, terminal: TerminalDef) -> None:
        if terminal.name == TEXT:
            tags = "|".join(re.escape(t) for t in sorted(self.tags, key=len, reverse=True))
            terminal.pattern = PatternRE(rf"(?:(?!{tags})[\s\S])+" if tags else r"[\s\S]+")


@dataclass(frozen=True, slots=True)
class _Regex:
    pattern: str


class _Read(Transformer[Token, Expr]):
    """Lark's own syntax tree of a file to expressions."""

    def literal(self, children: list[Token]) -> Expr | _Regex:
        token = children[0]
        if token.startswith('"') and token.endswith('"'):
            return Literal(_unescape(str(token)[1:-1]))
        if token.startswith("/") and token.endswith("/"):
            if re.search(r"\(\?[=!<]", token):
                raise GrammarError(f"look-around in {token} is outside the shared subset")
            return _Regex(str(token)[1:-1])
        raise GrammarError(f"flags in {token} are outside the shared subset")

    def name(self, children: list[Token]) -> Expr:
        return Name(str(children[0]))

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
        return items[0] if len(items) == 1 else Seq(items)

    def alias(self, children: list[Expr | None]) -> Expr:
        if len(children) > 1 and children[1] is not None:
            raise GrammarError("aliases (->) are outside the shared subset")
        return _expr(children[0])

    def expansions(self, children: list[Expr]) -> Expr:
        return Alt(tuple(children)) if len(children) > 1 else children[0]

    def __default__(self, data: str, children: list[Expr], meta: object) -> Expr:
        raise GrammarError(f"{data} is outside the shared subset")


def _present(child: Tree[Token] | Token | None) -> bool:
    """Whether an optional part of a rule's head (modifier, parameters, priority) was written."""
    return any(map(_present, child.children)) if isinstance(child, Tree) else child is not None


def _expr(item: object) -> Expr:
    if isinstance(item, (Literal, Name, Seq, Alt, Repeat, _Regex)):
        return item  # type: ignore[return-value]  # a _Regex is only ever the whole of a terminal
    raise GrammarError(f"{item} is outside the shared subset")


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t", "r": "\r"}.get(m[1], m[1]), text)


@lru_cache(maxsize=1)
def _file_parser() -> Lark:
    """Lark's own grammar of its grammar files."""
    return Lark.open_from_package("lark", "lark.lark", ["grammars"], parser="lalr", propagate_positions=True)


def grammar_path(name: str) -> Path:
    """Where a built-in grammar file lies: inside the wheel, or beside the package in a checkout."""
    inside = Path(str(files("sgl_apr"))) / "grammars" / f"{name}.lark"
    return inside if inside.exists() else inside.parents[2] / "grammars" / f"{name}.lark"
