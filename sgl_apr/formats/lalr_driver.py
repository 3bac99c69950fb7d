"""Parses text with Lark's own parse tables and lexers, without Lark's token objects and error messages.

Lark spends most of its time on the line and column of every token, and, where a text does not match, on a message. The
runtime needs neither: it parses what every request has decoded, and often only asks whether it matches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from lark import Lark
from lark.lexer import BasicLexer, PatternStr

from sgl_apr.formats.reading_progress import report_position

END = "$END"  # Lark's name for the end of the text


class Lexeme(NamedTuple):
    """One token of a text.

    Attributes:
        type: The name of its terminal.
        value: Its text.
        start: Offset of its first character.
        end: Offset after its last character.
    """

    type: str
    value: str
    start: int
    end: int


Scan = Callable[[str, int], Lexeme | None]  # text, offset -> the token that begins there


class Node(NamedTuple):
    """The part of a text that matches one rule of the grammar file.

    Attributes:
        rule: The name of the rule.
        children: Its tokens, and the nodes of the rules that it refers to.
    """

    rule: str
    children: list[Node | Lexeme]


class Reduction(NamedTuple):
    """The step of the parser that replaces the last symbols by the rule that they match.

    Attributes:
        rule: The name of the rule.
        size: The number of symbols.
        inlined: Which of them are rules that Lark has made for a repetition. Their children become those of this rule.
    """

    rule: str
    size: int
    inlined: tuple[bool, ...] | None


class LalrTables:
    """The parse tables and contextual lexers of one Lark parser.

    Attributes:
        actions: For each state and symbol, the state after it, or a reduction.
        start: The first state.
        final: The last state.
        scans: For each state, a function that finds the next token of a text. A state that was not used yet has none.
    """

    def __init__(self, parser: Lark) -> None:
        interactive = parser.parse_interactive("")
        table: Any = interactive.parser_state.parse_conf.parse_table
        (self.start,), (self.final,) = table.start_states.values(), table.end_states.values()
        self.actions: dict[int, dict[str, int | Reduction]] = {
            state: {
                str(symbol): argument if isinstance(argument, int) else _reduction(argument)
                for symbol, (_, argument) in actions.items()
            }
            for state, actions in table.states.items()
        }
        lexer: Any = interactive.lexer_thread.lexer
        self._lexers: dict[int, BasicLexer] = lexer.lexers
        self.scans: dict[int, Scan] = {}

    def add_scan(self, state: int) -> Scan:
        """Return the function that finds the next token of a text in a state, and keep it."""
        scan = self.scans[state] = _scan(self._lexers[state])
        return scan


def _scan(lexer: BasicLexer) -> Scan:
    """Finds what a lexer of Lark finds."""
    terminals, unless = lexer.scanner.terminals, lexer.callback
    if len(terminals) == 1 and isinstance(terminals[0].pattern, PatternStr):
        only, value = terminals[0].name, terminals[0].pattern.value

        def find_fixed(text: str, offset: int) -> Lexeme | None:
            return (
                Lexeme(only, value, offset, offset + len(value)) if text.startswith(value, offset) else None
            )

        return find_fixed
    pattern = "|".join(f"(?P<{t.name}>{t.pattern.to_regexp()})" for t in terminals)
    match = re.compile(pattern, lexer.g_regex_flags).match

    def find(text: str, offset: int) -> Lexeme | None:
        if (found := match(text, offset)) is None:
            return None
        kind, value = str(found.lastgroup), found[0]
        if kind in unless:  # the text can also be that of a fixed terminal
            callback: Any = unless[kind]
            kind = callback.scanner.fullmatch(value) or kind
        return Lexeme(kind, value, offset, found.end())

    return find


def _reduction(rule: Any) -> Reduction:
    inlined = tuple(not symbol.is_term and symbol.name.startswith("_") for symbol in rule.expansion)
    return Reduction(str(rule.origin.name), len(inlined), inlined if any(inlined) else None)


class LalrParser:
    """One parse of one text.

    Args:
        tables: The tables of the parser.
    """

    def __init__(self, tables: LalrTables) -> None:
        self.tables = tables
        self.states = [tables.start]
        self._values: list[Node | Lexeme] = []

    def feed(self, token: Lexeme) -> bool:
        """Take the next token, and return whether it is accepted there. Nothing may follow one that is not."""
        actions, states, kind = self.tables.actions, self.states, token.type
        action = actions[states[-1]].get(kind)
        while isinstance(action, Reduction):
            self._reduce(action)
            action = actions[states[-1]].get(kind)
        if action is None:
            return False
        states.append(action)
        self._values.append(token)
        return True

    def finish(self) -> Node | None:
        """Return the node of the complete text; None if it cannot end here."""
        while self.states[-1] != self.tables.final:
            action = self.tables.actions[self.states[-1]].get(END)
            if not isinstance(action, Reduction):
                return None
            self._reduce(action)
        node = self._values[-1]
        assert isinstance(node, Node)
        return node

    def _reduce(self, reduction: Reduction) -> None:
        rule, size, inlined = reduction
        states, values = self.states, self._values
        children: list[Node | Lexeme] = []
        if size:
            children = values[-size:]
            del states[-size:], values[-size:]
        if inlined:
            children = _inline(children, inlined)
        goto = self.tables.actions[states[-1]][rule]
        assert isinstance(goto, int)
        states.append(goto)
        values.append(Node(rule, children))


def _inline(children: list[Node | Lexeme], inlined: tuple[bool, ...]) -> list[Node | Lexeme]:
    merged: list[Node | Lexeme] = []
    for child, is_inlined in zip(children, inlined, strict=True):
        if not is_inlined:
            merged.append(child)
        elif isinstance(child, Node):
            if merged:
                merged += child.children
            else:  # a repetition of n items is n nodes deep: its list grows, so that the time is linear
                merged = child.children
    return merged


def parse_text(tables: LalrTables, text: str) -> Node | None:
    """Return the node of a text; None if it does not match."""
    parser, scans, size, offset = LalrParser(tables), tables.scans, len(text), 0
    states, feed = parser.states, parser.feed
    report_position(lambda: offset)
    while offset < size:
        state = states[-1]
        token = (scans[state] if state in scans else tables.add_scan(state))(text, offset)
        if token is None or not feed(token):
            return None
        offset = token.end
    return parser.finish()
