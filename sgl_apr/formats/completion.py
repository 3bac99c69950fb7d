"""What would complete a text that was cut off, in the grammar's order; it decodes nothing."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator

from lark import Token, UnexpectedInput
from lark.lexer import PatternStr
from lark.parsers.lalr_interactive_parser import InteractiveParser

from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar

PLACEHOLDER = "..."  # what stands where the grammar wants text and none was written
MOST_STEPS = 200

# The number that belongs where so many have been written, behind this fixed text.
NumberOf = Callable[[int, str], str]


def completion(grammar: Grammar, start: str, text: str, number: NumberOf) -> str | None:
    """The shortest text that makes `text` a whole `start`, or None if it can't become one.

    Used where decoding was cut: it closes what is open, in grammar order, and puts `FILLER` only
    where the grammar wants text and there is none. It forks nothing and waits for nothing.
    """
    interactive = grammar.parser(start).parse_interactive(text)
    added, count, kind, last, missing = "", 0, "", "", ""
    try:
        for token in interactive.iter_parse():
            # The text may end within a number, such as the 2 of 2.1: what is missing of it comes first.
            whole = number(count, last) if token.type == NUMBER else ""
            missing = whole[len(token) :] if whole.startswith(token) else ""
            count, kind, last = count + (token.type == NUMBER), token.type, str(token)
        added = missing
    except UnexpectedInput as error:
        # Or within a name, or a fixed piece, such as half a tag.
        rest = text[error.pos_in_stream :] if error.pos_in_stream is not None else ""
        fixed = next((t for t in _fixed(grammar, start, interactive) if rest and t.startswith(rest)), None)
        if rest and rest != missing and missing.startswith(rest):
            added = missing[len(rest) :]
        elif fixed is not None:
            interactive.feed_token(fixed)
            added, last = str(fixed)[len(rest) :], str(fixed)
        elif rest and kind != TEXT and (filler := _filler(grammar, kind, last + rest)):
            added = filler
        else:
            return None
    avoid = {grammar.opening_literal(rule) for rule in ("fork", "wait")}
    if not added and "$END" not in interactive.accepts():
        closing = [t for t in _fixed(grammar, start, interactive) if str(t) not in avoid]
        for begun in _begun(closing, text):
            more = completion(grammar, start, text + begun, number)
            if more is not None:
                return begun + more
    queue = deque([(interactive, added, count, last)])
    for _ in range(MOST_STEPS):
        if not queue:
            return None
        state, added, count, last = queue.popleft()
        accepted = state.accepts()
        if "$END" in accepted:
            return added
        steps = [t for t in _fixed(grammar, start, state) if str(t) not in avoid]
        for name in sorted(accepted):
            if name == NUMBER:
                steps.append(Token(NUMBER, number(count, last)))
            elif name == TEXT and not steps:
                steps.append(Token(TEXT, PLACEHOLDER))
            elif name != TEXT and (filler := _filler(grammar, name)):
                steps.append(Token(name, filler))
        for token in steps:
            following = state.copy()
            following.feed_token(token)
            queue.append((following, added + str(token), count + (token.type == NUMBER), str(token)))
    return None


def _begun(options: list[Token], text: str) -> Iterator[str]:
    """What is missing of each option that `text` ends with the beginning of: "ead>" behind "</Thr"."""
    for option in options:
        for known in range(len(option) - 1, 1, -1):
            if text.endswith(option[:known]):
                yield str(option[known:])


def _filler(grammar: Grammar, name: str, begun: str = "") -> str | None:
    """What makes a terminal of `begun` that is a regular expression."""
    pattern = grammar.terminals.get(name)
    fillers = (PLACEHOLDER, "0", "x") if isinstance(pattern, str) else ()
    return next((f for f in fillers if re.fullmatch(str(pattern), begun + f)), None)


def _fixed(grammar: Grammar, start: str, state: InteractiveParser) -> Iterator[Token]:
    """The fixed texts that the parser would take next."""
    accepted = state.accepts()
    for terminal in grammar.parser(start).terminals:
        if terminal.name in accepted and isinstance(terminal.pattern, PatternStr):
            yield Token(terminal.name, terminal.pattern.value)
