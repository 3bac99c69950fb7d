"""A dialect's .lark file: its rules, its tags, its fixed texts, and its Lark parsers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, TypeGuard, TypeVar

from lark import Lark, Token, Tree
from lark.exceptions import LarkError
from lark.lexer import PatternRE, TerminalDef

from sgl_apr.errors import GrammarError
from sgl_apr.formats.grammar_checks import NUMBER as NUMBER
from sgl_apr.formats.grammar_checks import TEXT as TEXT
from sgl_apr.formats.grammar_checks import check_expansion, check_grammar
from sgl_apr.formats.grammar_source import declared_options, parse_source, separate_tags
from sgl_apr.formats.grammar_source import grammar_path as grammar_path
from sgl_apr.formats.lalr_driver import LalrTables
from sgl_apr.formats.lark_ast import (
    Alt,
    Expr,
    ExpressionTransformer,
    Regex,
    Repeat,
    SequenceExpr,
    StringLiteral,
    SymbolRef,
    is_present,
)

T = TypeVar("T")


def merge_tag_parts(items: Sequence[T], number: str) -> list[T]:
    """Replace NUMBER by a number and merge the parts of tags: `<FORK-` NUMBER `>` becomes the tag `<FORK-2>`."""
    merged: list[Any] = []
    for item in items:
        last = merged[-1] if merged else None
        fixed = StringLiteral(number) if item == SymbolRef(NUMBER) else item
        if isinstance(last, StringLiteral) and isinstance(fixed, StringLiteral) and _is_open(last.text):
            merged[-1] = StringLiteral(last.text + fixed.text)
        else:
            merged.append(fixed)
    return merged


def _is_open(text: str) -> bool:
    """Whether a text begins a tag that it does not end."""
    return text.startswith("<") and text.count(">") < text.count("<") and text != "<"


def _is_tag(item: object) -> TypeGuard[StringLiteral]:
    return isinstance(item, StringLiteral) and item.is_tag


def _alternatives(expr: Expr) -> tuple[Expr, ...]:
    return expr.options if isinstance(expr, Alt) else (expr,)


class Grammar:
    """One grammar file, in the subset that Lark, llguidance and xgrammar share.

    Rules are sequences, alternatives, `?`, `*`, `+`, string literals and terminals. A terminal is a string or
    one regular expression without look-around. The terminal `TEXT` is free text, and `NUMBER` numbers repeated
    items.

    Args:
        source: The text of the file.
        name: The name of the file, for error messages.

    Raises:
        GrammarError: The file holds anything else. The message names the line.

    Attributes:
        source: The text of the file, with every tag as a string of its own.
        declared_options: The options of the file's `//@` lines, as they are written, each with its line.
        rules: The rules by name.
        terminals: The terminals by name: fixed texts, and regular expressions as strings.
        lines: The line of each rule and terminal.
    """

    def __init__(self, source: str, name: str = "grammar") -> None:
        tree = parse_source(source, name)
        separated = separate_tags(source, tree, name)
        self.source, self.name = separated, name
        self.declared_options = dict(declared_options(source, name))
        self.rules: dict[str, Expr] = {}
        self.terminals: dict[str, StringLiteral | str] = {}
        self.lines: dict[str, int] = {}
        for item in (tree if separated == source else parse_source(separated, name)).children:
            self._add(item)
        if TEXT not in self.terminals:
            raise GrammarError(f"{name}: no terminal {TEXT}, expected e.g. {TEXT} : /(.|\\n)+/")
        check_grammar(self.rules, self.terminals, self.lines, name)
        self._parsers: dict[str, Lark] = {}
        self._tables: dict[str, LalrTables] = {}
        self._expandable: set[str] = set()  # rules that are known to end when they are written out

    def _add(self, item: Tree[Token] | Token) -> None:
        line = item.meta.line if isinstance(item, Tree) else item.line
        where = f"{self.name}, line {line}"
        if not isinstance(item, Tree) or item.data not in ("rule", "token"):
            what = item.data if isinstance(item, Tree) else item
            raise GrammarError(f"{where}: {what} is not supported, expected rules and terminals only")
        key = str(item.children[0])
        if key in self.lines:
            raise GrammarError(f"{where}: {key} is already defined in line {self.lines[key]}")
        if key.startswith(("!", "?", "_")) or len(key) > 64:
            raise GrammarError(
                f"{where}: {key[:64]}: expected a name of at most 64 characters that begins with a letter"
            )
        try:
            expr = ExpressionTransformer().transform(item.children[-1])  # type: ignore[arg-type]  # always a tree
        except LarkError as error:
            cause = error.__context__ if isinstance(error.__context__, GrammarError) else error
            raise GrammarError(f"{where}: {cause}") from None
        if any(is_present(child) for child in item.children[1:-1]):
            raise GrammarError(f"{where}: templates and priorities are not supported")
        self.lines[key] = line or 1
        if item.data == "rule":
            self.rules[key] = expr
        elif isinstance(expr, (StringLiteral, Regex)):
            self.terminals[key] = expr if isinstance(expr, StringLiteral) else expr.pattern
        else:
            raise GrammarError(f"{where}: terminal {key}: expected one string or one regular expression")

    @cached_property
    def tag_literals(self) -> tuple[str, ...]:
        """Every tag, or its beginning if it holds a number or a name. Free text cannot contain these."""
        return tuple(dict.fromkeys(i.text for seq in self._sequences() for i in seq if _is_tag(i)))

    def tags(self, numbers: Sequence[str] = ()) -> tuple[str, ...]:
        """Return every tag that can be one token, in the order of the file. Numbered tags appear once for each number."""
        unique: dict[str, None] = {}
        for seq in self._sequences():
            for n in numbers or ("",):
                tags = [i.text for i in merge_tag_parts(seq, n) if _is_tag(i)]
                unique |= dict.fromkeys(
                    t
                    for t in tags
                    if not _is_open(t) or (t in self.tag_literals and SymbolRef(NUMBER) not in seq)
                )
        return tuple(unique)

    def _sequences(self, rules: Iterable[Expr] | None = None) -> Iterator[tuple[Expr, ...]]:
        """Every sequence of all rules, or of the given ones. A single item counts as a sequence."""

        def visit(expr: Expr) -> Iterator[tuple[Expr, ...]]:
            match expr:
                case SequenceExpr(items):
                    yield items
                    for item in items:
                        if not isinstance(item, (StringLiteral, SymbolRef)):
                            yield from visit(item)
                case Alt(options):
                    for option in options:
                        yield from visit(option)
                case Repeat(item):
                    yield from visit(item)
                case _:
                    yield (expr,)

        for expr in self.rules.values() if rules is None else rules:
            yield from visit(expr)

    def rule(self, name: str) -> Expr:
        """Return the body of a rule.

        Raises:
            GrammarError: The file has no rule of that name.
        """
        if name not in self.rules:
            raise GrammarError(
                f"{self.name}: no rule {name!r}, expected one of {', '.join(sorted(self.rules))}"
            )
        return self.rules[name]

    def render_rule(
        self,
        rule: str,
        number: str = "",
        text: str = "",
        name: str = "",
        each: Sequence[tuple[str, str]] = (),
    ) -> str:
        """Return the text that the runtime injects for a rule.

        Args:
            rule: The name of the rule. A rule that the file does not have renders as an empty string.
            number: Replaces NUMBER.
            text: Replaces TEXT. Optional items are only rendered with a text.
            name: Replaces any other terminal that is a regular expression.
            each: (number, text) pairs. A repeated rule is rendered once for each.

        Raises:
            GrammarError: The rule holds something that has no fixed text.
        """
        if text or name or each:
            return self._render(rule, number, text, name, each)
        return _render_tags(self, rule, number)

    def _render(self, rule: str, number: str, text: str, name: str, each: Sequence[tuple[str, str]]) -> str:
        def write(expr: Expr) -> str:
            match expr:
                case StringLiteral(value):
                    return value
                case SymbolRef(key) if key == NUMBER and number:
                    return number
                case SymbolRef(key) if key == TEXT and text:
                    return text
                case SymbolRef(key) if isinstance(terminal := self.terminals.get(key), StringLiteral):
                    return terminal.text
                case SymbolRef(key) if key in self.rules:
                    return write(self.rules[key])
                case SymbolRef(key) if key not in (NUMBER, TEXT) and name:
                    return name
                case Repeat(item, unbounded=False):
                    return write(item) if text else ""
                case Repeat(SymbolRef(key), unbounded=True) if each:
                    return "".join(self.render_rule(key, n, t, t) for n, t in each)
                case SequenceExpr(items):
                    return "".join(map(write, items))
            raise GrammarError(f"{self.name}: rule {rule!r} cannot be rendered: {expr} has no fixed text")

        if rule not in self.rules:
            return ""
        if rule not in self._expandable:
            check_expansion(self.rules, rule, self.name)
            self._expandable.add(rule)
        return write(self.rules[rule])

    def closing_literal(self, rule: str, number: str = "") -> str:
        """Return the fixed text that a rule always ends with, at which its decoding stops; empty if it ends in free text."""
        return _closing_literal(self, rule, number)

    def is_line_break(self, expr: Expr) -> bool:
        """Return whether an item is a line break."""
        terminal = self.terminals.get(expr.name) if isinstance(expr, SymbolRef) else expr
        return terminal == StringLiteral("\n")

    def has_repetition(self, rule: str) -> bool:
        """Return whether a rule holds a repetition, as a fork repeats its outlines."""
        expr = self.rules.get(rule)
        return any(
            isinstance(i, Repeat) and i.unbounded
            for i in (expr.items if isinstance(expr, SequenceExpr) else ())
        )

    def max_name_chars(self, rule: str) -> int:
        """Return the maximal length in characters of a rule's terminal that is neither TEXT nor NUMBER; 0 without one."""
        widths = {t.name: t.pattern.max_width for t in self.parser("trace").terminals}
        names = [
            i.name for seq in self._sequences([self.rule(rule)]) for i in seq if isinstance(i, SymbolRef)
        ]
        own = [n for n in names if n not in (TEXT, NUMBER) and isinstance(self.terminals.get(n), str)]
        return min(max((widths.get(n, 0) for n in own), default=0), 256)

    def tags_in_rule(self, rule: str) -> tuple[str, ...]:
        """Return the tags in a rule itself, without those of the rules that it refers to."""
        sequences = self._sequences([self.rules[rule]] if rule in self.rules else [])
        return tuple(i.text for seq in sequences for i in seq if _is_tag(i))

    def opening_literal(self, rule: str) -> str:
        """Return the fixed text that a rule begins with; empty if there is none."""
        for _ in range(len(self.rules) + 1):  # a rule can begin with itself
            expr = self.rules.get(rule)
            first = next(iter(expr.items), None) if isinstance(expr, SequenceExpr) else expr
            if isinstance(first, SymbolRef) and first.name in self.rules:
                rule = first.name
            else:
                return first.text if isinstance(first, StringLiteral) else ""
        return ""

    def parser(self, start: str) -> Lark:
        """Return the Lark parser (LALR, contextual lexer) of rule `start`. Its TEXT ends where a tag begins."""
        if start not in self._parsers:
            self.rule(start)
            try:
                self._parsers[start] = Lark(
                    self.source,
                    parser="lalr",
                    start=start,
                    keep_all_tokens=True,
                    maybe_placeholders=False,
                    edit_terminals=self._exclude_tags,
                )
            except LarkError as error:
                raise GrammarError(f"{self._place_of(error)}: {str(error).splitlines()[0]}") from error
        return self._parsers[start]

    def tables(self, start: str) -> LalrTables:
        """Return the parse tables of rule `start`."""
        if start not in self._tables:
            self._tables[start] = LalrTables(self.parser(start))
        return self._tables[start]

    def _place_of(self, error: LarkError) -> str:
        """The file, and the line of the first rule that an error of Lark names."""
        names = re.findall(r"<_*([a-z]\w*?)(?:_(?:star|plus)_\d+)? :", str(error))
        line = next((self.lines[name] for name in names if name in self.lines), None)
        return self.name if line is None else f"{self.name}, line {line}"

    def _exclude_tags(self, terminal: TerminalDef) -> None:
        if terminal.name != TEXT:
            return
        tags = "|".join(re.escape(t) for t in sorted(self.tag_literals, key=len, reverse=True))
        # Only where a tag can begin is it worth to look for one. Nothing follows, so no match has to be given up.
        first = "".join(re.escape(c) for c in sorted({t[0] for t in self.tag_literals}))
        terminal.pattern = PatternRE(rf"(?:[^{first}]++|(?!{tags})[{first}])++" if tags else r"[\s\S]+")


@lru_cache(maxsize=1024)  # called for every branch
def _render_tags(grammar: Grammar, rule: str, number: str) -> str:
    return grammar._render(rule, number, "", "", ())


@lru_cache(maxsize=1024)  # called several times for every request
def _closing_literal(grammar: Grammar, rule: str, number: str) -> str:
    ends = _closing_literals(grammar, rule, number, set())
    if len(ends) > 1:
        raise GrammarError(
            f"{grammar.name}: rule {rule!r}: expected the same tag at the end of every alternative"
        )
    return ends.pop() if ends else ""


def _closing_literals(grammar: Grammar, rule: str, number: str, visited: set[str]) -> set[str]:
    """The fixed texts at the ends of a rule's alternatives. Rules that were visited add nothing, so recursion ends."""
    ends: set[str] = set()
    if rule in visited or rule not in grammar.rules:
        return ends
    visited.add(rule)
    for expr in _alternatives(grammar.rules[rule]):
        items = merge_tag_parts(expr.items if isinstance(expr, SequenceExpr) else (expr,), number)
        last = items[-1] if items else None
        if isinstance(last, SymbolRef) and last.name in grammar.rules:
            ends |= _closing_literals(grammar, last.name, number, visited)
        else:
            ends.add(last.text if isinstance(last, StringLiteral) else "")
    return ends
