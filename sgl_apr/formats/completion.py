"""Completion of text that was cut off: the shortest text that closes everything that is open."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator

from lark import Token, UnexpectedInput
from lark.lexer import PatternStr
from lark.parsers.lalr_interactive_parser import InteractiveParser

from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar

PLACEHOLDER = "..."  # fills the place of text that the grammar requires and that was not written
MAX_STEPS = 200

# Takes how many numbers the text has so far and the fixed text before the next one, and returns the next number.
NumberOf = Callable[[int, str], str]


def complete_text(grammar: Grammar, start: str, text: str, number: NumberOf) -> str | None:
    """Return the shortest text that makes a cut-off text a complete match of a rule.

    It closes what is open, in the order of the grammar, and adds `PLACEHOLDER` only where the grammar requires
    text and there is none. It never adds a fork or a wait.

    Args:
        grammar: The grammar.
        start: The rule that the completed text has to match.
        text: The text as it was cut off.
        number: Returns the number that belongs at a place.

    Returns:
        The text to append, or None if nothing completes `text`.
    """
    interactive = grammar.parser(start).parse_interactive(text)
    added, count, kind, last, missing = "", 0, "", "", ""
    try:
        for token in interactive.iter_parse():
            # The text can end within a number, such as the 2 of 2.1. The rest of the number comes first.
            expected = number(count, last) if token.type == NUMBER else ""
            missing = expected[len(token) :] if expected.startswith(token) else ""
            count, kind, last = count + (token.type == NUMBER), token.type, str(token)
        added = missing
    except UnexpectedInput as error:
        # The text can also end within a name or a fixed text, such as half a tag.
        rest = text[error.pos_in_stream :] if error.pos_in_stream is not None else ""
        fixed = next(
            (t for t in _fixed_tokens(grammar, start, interactive) if rest and t.startswith(rest)), None
        )
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
        closing = [t for t in _fixed_tokens(grammar, start, interactive) if str(t) not in avoid]
        for suffix in _missing_suffixes(closing, text):
            more = complete_text(grammar, start, text + suffix, number)
            if more is not None:
                return suffix + more
    # Breadth-first search over what the parser accepts, so that the first complete text is the shortest.
    queue = deque([(interactive, added, count, last)])
    for _ in range(MAX_STEPS):
        if not queue:
            return None
        state, added, count, last = queue.popleft()
        accepted = state.accepts()
        if "$END" in accepted:
            return added
        steps = [t for t in _fixed_tokens(grammar, start, state) if str(t) not in avoid]
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


def _missing_suffixes(options: list[Token], text: str) -> Iterator[str]:
    """The missing rest of each option whose beginning is the end of `text`: "ead>" for "</Thr"."""
    for option in options:
        for known in range(len(option) - 1, 1, -1):
            if text.endswith(option[:known]):
                yield str(option[known:])


def _filler(grammar: Grammar, name: str, prefix: str = "") -> str | None:
    """A text that, appended to `prefix`, matches a terminal that is a regular expression."""
    pattern = grammar.terminals.get(name)
    fillers = (PLACEHOLDER, "0", "x") if isinstance(pattern, str) else ()
    return next((f for f in fillers if re.fullmatch(str(pattern), prefix + f)), None)


def _fixed_tokens(grammar: Grammar, start: str, state: InteractiveParser) -> Iterator[Token]:
    """The fixed texts that the parser accepts next."""
    accepted = state.accepts()
    for terminal in grammar.parser(start).terminals:
        if terminal.name in accepted and isinstance(terminal.pattern, PatternStr):
            yield Token(terminal.name, terminal.pattern.value)
