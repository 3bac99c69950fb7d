"""Parses text with Lark's own parse tables and lexers, without Lark's token objects, trees and error messages.

Lark spends most of its time on the line and column of every token, and, where a text does not match, on a message. The
runtime needs neither: it parses what every request has decoded, and often only asks whether it matches. For the same
reason tokens and parts are plain tuples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lark import Lark
from lark.lexer import BasicLexer, PatternStr

from sgl_apr.formats.reading_progress import report_position

END = "$END"  # Lark's name for the end of the text

Lexeme = tuple[
    str, str, int, int
]  # name of the terminal, its text, and offsets of its first and after its last character
# A part of a text that matches a rule of the file: the rule, the index of its first token, that after its last token,
# and the index of the first part inside it. The parts inside it stand right before it.
Part = tuple[str, int, int, int]
Scan = Callable[[str, int], Lexeme | None]  # text, offset -> the token that begins there


class Reduction(NamedTuple):
    """The step of the parser that replaces the last symbols by the rule that they match.

    Attributes:
        rule: The name of the rule.
        size: The number of symbols.
        is_generated: Whether Lark has made the rule, for a repetition.
    """

    rule: str
    size: int
    is_generated: bool


class LalrTables:
    """The parse tables and contextual lexers of one Lark parser.

    Attributes:
        actions: For each state and symbol, the state after it, or a reduction.
        start: The first state.
        final: The last state.
        fixed: For each state that accepts one fixed text alone: its terminal, the text, and the state after it.
        scans: For other states, a function that finds the next token. A state that was not used yet has none.
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
        self.fixed: dict[int, tuple[str, str, int]] = dict(self._fixed_texts())
        self.scans: dict[int, Scan] = {}

    def _fixed_texts(self) -> Iterator[tuple[int, tuple[str, str, int]]]:
        for state, lexer in self._lexers.items():
            if len(lexer.terminals) == 1:
                (terminal,) = lexer.terminals
                following = self.actions[state].get(terminal.name)
                if isinstance(terminal.pattern, PatternStr) and isinstance(following, int):
                    yield state, (terminal.name, terminal.pattern.value, following)

    def add_scan(self, state: int) -> Scan:
        """Return the function that finds the next token of a text in a state, and keep it."""
        scan = self.scans[state] = _scan(self._lexers[state])
        return scan


def _scan(lexer: BasicLexer) -> Scan:
    """Finds what a lexer of Lark finds."""
    terminals, unless = lexer.scanner.terminals, lexer.callback
    pattern = "|".join(f"(?P<{t.name}>{t.pattern.to_regexp()})" for t in terminals)
    match = re.compile(pattern, lexer.g_regex_flags).match

    def find(text: str, offset: int) -> Lexeme | None:
        if (found := match(text, offset)) is None:
            return None
        kind, value = str(found.lastgroup), found[0]
        if kind in unless:  # the text can also be that of a fixed terminal
            callback: Any = unless[kind]
            kind = callback.scanner.fullmatch(value) or kind
        return kind, value, offset, found.end()

    return find


def _reduction(rule: Any) -> Reduction:
    name = str(rule.origin.name)
    return Reduction(name, len(rule.expansion), name.startswith("_"))


class LalrParser:
    """One parse of one text.

    Args:
        tables: The tables of the parser.

    Attributes:
        tokens: The tokens so far.
        parts: The parts so far, each after those inside it.
    """

    def __init__(self, tables: LalrTables) -> None:
        self.tables = tables
        self.tokens: list[Lexeme] = []
        self.parts: list[Part] = []
        self._states = [tables.start]
        self._starts: list[
            tuple[int, int]
        ] = []  # of each symbol on the stack: its first token, and its first part

    def parse(self, text: str) -> bool:
        """Parse a text, and return whether it matches."""
        tables, states, starts = self.tables, self._states, self._starts
        tokens, parts, fixed, scans = self.tokens, self.parts, tables.fixed, tables.scans
        report_position(self._position)
        size, offset = len(text), 0
        while offset < size:
            state = states[-1]
            if state in fixed:  # most tokens: what `feed` does is written out
                kind, value, following = fixed[state]
                if not text.startswith(value, offset):
                    return False
                starts.append((len(tokens), len(parts)))
                tokens.append((kind, value, offset, offset := offset + len(value)))
                states.append(following)
                continue
            token = (scans[state] if state in scans else tables.add_scan(state))(text, offset)
            if token is None or not self.feed(token):
                return False
            offset = token[3]
        return self.finish()

    def _position(self) -> int:
        return self.tokens[-1][3] if self.tokens else 0

    def feed(self, token: Lexeme) -> bool:
        """Take the next token, and return whether it is accepted there. Nothing may follow one that is not."""
        actions, states, kind = self.tables.actions, self._states, token[0]
        action = actions[states[-1]].get(kind)
        while isinstance(action, Reduction):
            self._reduce(action)
            action = actions[states[-1]].get(kind)
        if action is None:
            return False
        states.append(action)
        self._starts.append((len(self.tokens), len(self.parts)))
        self.tokens.append(token)
        return True

    def finish(self) -> bool:
        """Return whether the text is complete. Nothing may follow."""
        while self._states[-1] != self.tables.final:
            action = self.tables.actions[self._states[-1]].get(END)
            if not isinstance(action, Reduction):
                return False
            self._reduce(action)
        return True

    def _reduce(self, reduction: Reduction) -> None:
        rule, size, is_generated = reduction
        states, starts = self._states, self._starts
        if size:
            start = starts[-size]
            del states[-size:], starts[-size:]
        else:
            start = len(self.tokens), len(self.parts)
        starts.append(start)
        if not is_generated:
            self.parts.append((rule, start[0], len(self.tokens), start[1]))
        goto = self.tables.actions[states[-1]][rule]
        assert isinstance(goto, int)
        states.append(goto)
