"""Checks of a grammar file that its syntax alone does not show: undefined names, sizes, and where free text can end."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from re import _parser as regex_parser
from typing import Any

from sgl_apr.errors import GrammarError
from sgl_apr.formats.lark_ast import Alt, Expr, Regex, Repeat, SequenceExpr, StringLiteral, SymbolRef

TEXT = "TEXT"  # the terminal for free text
NUMBER = "NUMBER"  # the terminal that numbers repeated items
MAX_DEFINITIONS = 64  # rules and terminals
MAX_ALTERNATIVES = 256  # of one rule, once its optional parts are written out
MAX_ITEMS = 600  # items of all rules, once optional parts are written out
MAX_REGEX_CHARS = 500

Terminals = Mapping[str, "StringLiteral | str"]


def check_grammar(
    rules: Mapping[str, Expr], terminals: Terminals, lines: Mapping[str, int], name: str
) -> None:
    """Check the rules and terminals of a grammar file.

    Args:
        rules: The rules by name.
        terminals: The terminals by name.
        lines: The line of each rule and terminal.
        name: The name of the file, for error messages.

    Raises:
        GrammarError: A name is not defined, the grammar is too large, a regular expression is not valid or matches
            tags, or something other than a tag follows free text. The message names the line.
    """
    if len(lines) > MAX_DEFINITIONS:
        raise GrammarError(f"{name}: {len(lines)} rules and terminals, expected at most {MAX_DEFINITIONS}")
    for key, terminal in terminals.items():
        where = f"{name}, line {lines[key]}: terminal {key}"
        if isinstance(terminal, str):
            _check_regex(key, terminal, where)
        elif key in (TEXT, NUMBER):
            raise GrammarError(f"{where}: expected a regular expression")
    total = 0
    for key, expr in rules.items():
        where = f"{name}, line {lines[key]}: rule {key}"
        if holds_regex(expr):
            raise GrammarError(f"{where}: a regular expression in a rule, expected the name of a terminal")
        for symbol in symbols_in(expr):
            if symbol not in rules and symbol not in terminals:
                raise GrammarError(f"{where}: {symbol!r} used but not defined")
        alternatives, items = _expanded_size(expr)
        total += items
        if alternatives > MAX_ALTERNATIVES or total > MAX_ITEMS:
            raise GrammarError(
                f"{where}: too many alternatives and optional parts, expected at most {MAX_ALTERNATIVES} combinations"
            )
    followers = _Followers(rules, terminals)
    for key in rules:
        for item in followers.of_text[key]:
            if not (isinstance(item, StringLiteral) and item.is_tag):
                shown = repr(item.text) if isinstance(item, StringLiteral) else item.name
                raise GrammarError(
                    f"{name}, line {lines[key]}: rule {key}: {shown} follows {TEXT}, expected a tag: free text ends "
                    "where a tag begins"
                )


def symbols_in(expr: Expr) -> Iterator[str]:
    """Yield the names that an expression refers to."""
    if isinstance(expr, SymbolRef):
        yield expr.name
    for part in _parts(expr):
        yield from symbols_in(part)


def holds_regex(expr: Expr | Regex) -> bool:
    """Return whether an expression holds a regular expression, which only a terminal can."""
    return isinstance(expr, Regex) or any(map(holds_regex, _parts(expr)))


def unused_definitions(rules: Mapping[str, Expr], terminals: Terminals, roots: frozenset[str]) -> list[str]:
    """Return the rules and terminals that no root refers to, directly or through other rules."""
    used: set[str] = set()
    pending = [root for root in roots if root in rules]
    while pending:
        if (name := pending.pop()) not in used:
            used.add(name)
            pending += symbols_in(rules[name]) if name in rules else ()
    return [name for name in (*rules, *terminals) if name not in used]


def _parts(expr: Expr) -> tuple[Expr, ...]:
    match expr:
        case SequenceExpr(parts) | Alt(parts):
            return parts
        case Repeat(item):
            return (item,)
    return ()


def _combined(expr: Expr, parts: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The alternatives of an expression and their items in total, from those of its parts; both end at a maximum."""
    cap = MAX_ITEMS + 1
    match expr:
        case SequenceExpr():
            alternatives, items = 1, 0
            for a, i in parts:
                alternatives, items = min(alternatives * a, cap), min(items * a + i * alternatives, cap)
            return alternatives, items
        case Alt():
            return min(sum(a for a, _ in parts), cap), min(sum(i for _, i in parts), cap)
        case Repeat(_, min_count):
            return parts[0][0] + 1 - min_count, parts[0][1]
    return 1, 1


def _expanded_size(expr: Expr) -> tuple[int, int]:
    """The alternatives of an expression, and their items in total, once optional parts are written out."""
    return _combined(expr, [_expanded_size(part) for part in _parts(expr)])


def check_expansion(rules: Mapping[str, Expr], rule: str, name: str) -> None:
    """Check that a rule can be written out, with the rules that it refers to, as a list of alternatives.

    A repetition by `*` or `+` is not written out, but what it repeats is checked as well.

    Raises:
        GrammarError: The rule refers to itself other than in a repetition, or has too many alternatives.
    """
    sizes: dict[str, tuple[int, int]] = {}
    pending = [rule]

    def size(expr: Expr, within: tuple[str, ...]) -> tuple[int, int]:
        match expr:
            case SymbolRef(key) if key in within:
                raise GrammarError(f"{name}: rule {key!r} is recursive, expected recursion by * or + only")
            case SymbolRef(key) if key in rules:
                if key not in sizes:
                    sizes[key] = size(rules[key], (*within, key))
                return sizes[key]
            case Repeat(item, unbounded=True):
                pending.extend(key for key in symbols_in(item) if key in rules)
                return 2, 2
        parts = [size(part, within) for part in _parts(expr)]
        return _combined(expr, parts)

    while pending:
        key = pending.pop()
        if key in rules and key not in sizes:
            sizes[key] = size(rules[key], (key,))
    if (largest := max(sizes, key=lambda key: sizes[key][1], default=None)) is not None:
        alternatives, items = sizes[largest]
        if alternatives > MAX_ALTERNATIVES or items > MAX_ITEMS:
            raise GrammarError(
                f"{name}: rule {largest!r} has too many alternatives and optional parts, expected at most "
                f"{MAX_ALTERNATIVES} combinations"
            )


def _check_regex(key: str, pattern: str, where: str) -> None:
    if len(pattern) > MAX_REGEX_CHARS:
        raise GrammarError(f"{where}: the regular expression is longer than {MAX_REGEX_CHARS} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error"
            )  # such as a possible nested set, which other engines read differently
            re.compile(pattern)
            parsed = regex_parser.parse(pattern)
    except (re.error, Warning, OverflowError, RecursionError, ValueError) as error:
        raise GrammarError(f"{where}: not a valid regular expression: {error}") from None
    if parsed.getwidth()[0] == 0:
        raise GrammarError(f"{where}: the regular expression matches an empty text")
    if key != TEXT and _names_tag(parsed):
        raise GrammarError(
            f"{where}: the regular expression holds a tag. Expected the tag as a string in a rule, because a tag can be "
            "one token of a tokenizer, which no regular expression matches"
        )


def _names_tag(parsed: Any) -> bool:
    """Whether a parsed regular expression has `<` and then what can be the name of a tag."""
    return re.search(r"</?[A-Za-z*]", "".join(_characters(parsed))) is not None


def _characters(node: Any) -> Iterator[str]:
    """The literal characters of a parsed regular expression; `*` for a class of characters, a null character between
    alternatives."""
    if isinstance(node, regex_parser.SubPattern):
        for child in node:
            yield from _characters(child)
        return
    operator, value = str(node[0]), node[1]
    if operator == "LITERAL":
        yield chr(value)
    elif operator == "IN" and len(value) == 1 and str(value[0][0]) == "LITERAL":
        yield chr(value[0][1])
    elif operator in ("IN", "ANY", "NOT_LITERAL"):
        yield "*"
    elif operator == "BRANCH":
        for branch in value[1]:
            yield from _characters(branch)
            yield "\0"
    elif operator == "SUBPATTERN" or "REPEAT" in operator:
        yield from _characters(value[-1])
    else:
        yield "\0"


class _Followers:
    """What can follow the free text of each rule, over all rules of a grammar."""

    def __init__(self, rules: Mapping[str, Expr], terminals: Terminals) -> None:
        self._rules, self._terminals = rules, terminals
        self._after: dict[str, set[StringLiteral | SymbolRef]] = {name: set() for name in rules}
        self.of_text: dict[str, set[StringLiteral | SymbolRef]] = {name: set() for name in rules}
        size = -1
        while size != (size := sum(map(len, (*self._after.values(), *self.of_text.values())))):
            for name, expr in rules.items():
                self._visit(expr, self._after[name], name)

    @cached_property
    def _rule_starts(self) -> dict[str, tuple[frozenset[StringLiteral | SymbolRef], bool]]:
        """What each rule can begin with, and whether it can be empty."""
        starts: dict[str, tuple[frozenset[StringLiteral | SymbolRef], bool]]
        starts = dict.fromkeys(self._rules, (frozenset(), False))
        while True:
            updated = {name: self._starts(expr, starts) for name, expr in self._rules.items()}
            if updated == starts:
                return starts
            starts = updated

    def _starts(
        self, expr: Expr, rules: Mapping[str, tuple[frozenset[StringLiteral | SymbolRef], bool]]
    ) -> tuple[frozenset[StringLiteral | SymbolRef], bool]:
        match expr:
            case StringLiteral():
                return frozenset({expr}), False
            case SymbolRef(name):
                terminal = self._terminals.get(name)
                item = terminal if isinstance(terminal, StringLiteral) else expr
                return rules.get(name, (frozenset({item}), False))
            case SequenceExpr(parts):
                first: frozenset[StringLiteral | SymbolRef] = frozenset()
                for part in parts:
                    starts, is_optional = self._starts(part, rules)
                    first |= starts
                    if not is_optional:
                        return first, False
                return first, True
            case Alt(options):
                pairs = [self._starts(option, rules) for option in options]
                return frozenset().union(*(p[0] for p in pairs)), any(p[1] for p in pairs)
            case Repeat(item, min_count):
                starts, is_optional = self._starts(item, rules)
                return starts, is_optional or not min_count

    def _visit(self, expr: Expr, after: set[StringLiteral | SymbolRef], rule: str) -> None:
        match expr:
            case SymbolRef(name) if name == TEXT:
                self.of_text[rule] |= after
            case SymbolRef(name) if name in self._rules:
                self._after[name] |= after
            case SequenceExpr(parts):
                for part in reversed(parts):
                    self._visit(part, after, rule)
                    starts, is_optional = self._starts(part, self._rule_starts)
                    after = after | starts if is_optional else set(starts)
            case Alt(options):
                for option in options:
                    self._visit(option, after, rule)
            case Repeat(item, unbounded=unbounded):
                more = self._starts(item, self._rule_starts)[0] if unbounded else frozenset()
                self._visit(item, after | more, rule)
