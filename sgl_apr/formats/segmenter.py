"""Parses a text by the rules of its grammar and splits it into segments, one for each role."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, NoReturn, get_args

from lark import Lark, UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken
from lark.lexer import PatternStr

from sgl_apr.errors import TraceError
from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar
from sgl_apr.formats.lalr_driver import LalrParser, Lexeme
from sgl_apr.trajectory.spans import Role

BRANCH_RULES = ("body", "branch", "rejoin")  # free text in these is the text of a branch


class Outline(NamedTuple):
    """The outline of one branch in a fork.

    Attributes:
        number: The number of the branch; empty if the format has none.
        text: The text of the outline.
        offset: Where it begins in the text, in characters.
    """

    number: str
    text: str
    offset: int


class Segment(NamedTuple):
    """A piece of text with one role in the grammar.

    Attributes:
        role: The role.
        start: Offset of the first character.
        end: Offset after the last character.
        number: The number in a header, result, wait or closer.
        name: The name in a result.
        outlines: The outlines of a fork.
        label: The text in a close, closer or result.
    """

    role: Role
    start: int
    end: int
    number: str = ""
    name: str = ""
    outlines: tuple[Outline, ...] = ()
    label: str = ""


def split_segments(grammar: Grammar, start: str, text: str) -> list[Segment]:
    """Split a text into segments, which cover it without gaps.

    Args:
        grammar: The grammar.
        start: The rule that the text has to match.
        text: The text.

    Raises:
        TraceError: The text does not match the rule.
    """
    segments = match_segments(grammar, start, text)
    if segments is None:
        raise syntax_error(grammar, start, text)
    return segments


def match_segments(grammar: Grammar, start: str, text: str) -> list[Segment] | None:
    """Split a text into segments as `split_segments` does; None if the text does not match the rule."""
    parser = LalrParser(grammar.tables(start))
    return segments_of(grammar, parser) if parser.parse(text) else None


def syntax_error(grammar: Grammar, start: str, text: str) -> TraceError:
    """Return the error of a text that does not match a rule: where it departs, and what Lark expects there."""
    parser = grammar.parser(start)
    try:
        parser.parse(text)
    except UnexpectedInput as error:
        return _trace_error(parser, error, text)
    raise AssertionError(f"Lark accepts a text of {len(text)} characters that its tables do not")


def segments_of(grammar: Grammar, parser: LalrParser, *, keep_empty: bool = False) -> list[Segment]:
    """Return the segments of a text that was parsed, in the order of the text.

    Args:
        grammar: The grammar.
        parser: Has parsed the text.
        keep_empty: Also return segments without text, which stand for tokens that error recovery has inserted.
    """
    tokens, parts = parser.tokens, parser.parts
    segments: list[Segment] = []
    # From the end, where each part comes before those inside it: what remains is before token `end`, and what of it is
    # in the last branch is at or after token `branch`.
    end = branch = len(tokens)
    index = len(parts) - 1
    while index >= 0:
        rule, first, stop, first_inside = parts[index]
        index -= 1
        role = SEGMENT_RULES.get(rule)
        if role is not None:
            if first < stop:
                if stop < end:
                    segments += _loose_segments(tokens, stop, end, branch, keep_empty)
                segments.append(_segment(grammar, parser, index + 1, role))
                end = first
            index = first_inside - 1
        elif rule in BRANCH_RULES and first < stop and first < branch:
            if stop < end:
                segments += _loose_segments(tokens, stop, end, branch, keep_empty)
            end, branch = stop, first
    segments += _loose_segments(tokens, 0, end, branch, keep_empty)
    segments.reverse()
    return segments


def _loose_segments(
    tokens: list[Lexeme], first: int, stop: int, branch: int, keep_empty: bool
) -> Iterator[Segment]:
    """Yield a segment for each token from the last one to the first; those from `branch` on are of a branch."""
    for k in range(stop - 1, first - 1, -1):
        kind, _, start, end = tokens[k]
        if end > start or keep_empty:
            yield Segment("closer" if kind != TEXT else "body" if k >= branch else "text", start, end)


def _segment(grammar: Grammar, parser: LalrParser, index: int, role: Role) -> Segment:
    _, first, stop, _ = parser.parts[index]
    tokens = parser.tokens[first:stop]
    start, end = tokens[0][2], tokens[-1][3]
    if role == "fork":
        return Segment(role, start, end, outlines=tuple(_outlines(grammar, parser, index)))
    values = _values(grammar, tokens)
    return Segment(
        role,
        start,
        end,
        number=values[NUMBER][1] if NUMBER in values else "",
        name=values[""][1] if "" in values else "",
        label=values[TEXT][1].strip() if TEXT in values else "",
    )


# Rules that are one segment each, with its role.
SEGMENT_RULES: dict[str, Role] = {
    r: r for r in get_args(Role) if r not in ("prompt", "text", "body", "call", "observation")
}
SEGMENT_RULES["failure"] = "result"


def _outlines(grammar: Grammar, parser: LalrParser, fork: int) -> Iterator[Outline]:
    for index in _parts_in(parser, fork) or [fork]:
        _, first, stop, _ = parser.parts[index]
        values = _values(grammar, parser.tokens[first:stop])
        text = values.get(TEXT, values.get(""))
        if text is not None:
            number = values.get(NUMBER)
            yield Outline(number[1] if number else "", text[1].strip(), (number or text)[2])


def _parts_in(parser: LalrParser, index: int) -> list[int]:
    """The parts right inside a part."""
    inside: list[int] = []
    first_inside, index = parser.parts[index][3], index - 1
    while index >= first_inside:
        inside.append(index)
        index = parser.parts[index][3] - 1
    return inside[::-1]


def _values(grammar: Grammar, tokens: Iterable[Lexeme]) -> dict[str, Lexeme]:
    """The first number, the first text, and under "" the first match of any other regular expression."""
    values: dict[str, Lexeme] = {}
    for token in tokens:
        kind = token[0]
        if kind in (NUMBER, TEXT):
            values.setdefault(kind, token)
        elif isinstance(grammar.terminals.get(kind), str):
            values.setdefault("", token)
    return values


def error_at(text: str, offset: int, found: str, expected: list[str]) -> TraceError:
    """Return a `TraceError` with the line and column of an offset in characters."""
    line = text.count("\n", 0, offset) + 1
    return TraceError(line, offset - (text.rfind("\n", 0, offset) + 1) + 1, found, expected)


def raise_on_defect(text: str) -> Callable[[str, int, int, str], NoReturn]:
    """Return a reporter of defects that raises `TraceError` for the first one."""

    def raise_(name: str, start: int, end: int, expected: str) -> NoReturn:
        raise error_at(text, start, text[start:end], [expected])

    return raise_


def _trace_error(parser: Lark, error: UnexpectedInput, text: str) -> TraceError:
    match error:
        case UnexpectedToken():
            names: set[str] = set(error.accepts or error.expected)
        case UnexpectedCharacters():
            names = set(error.allowed or ())
        case UnexpectedEOF():
            names = set(error.expected)
        case _:
            names = set()
    shown = {
        t.name: json.dumps(t.pattern.value) for t in parser.terminals if isinstance(t.pattern, PatternStr)
    }
    shown |= {TEXT: "free text", NUMBER: "a number"}
    expected = sorted(shown.get(n, n) for n in names - {"$END"})
    expected += ["the end"] if "$END" in names else []
    offset = error.pos_in_stream if error.pos_in_stream is not None else len(text)
    if isinstance(error, UnexpectedEOF) or (
        isinstance(error, UnexpectedToken) and error.token.type == "$END"
    ):
        return error_at(text, len(text), "", expected)
    piece = re.match(r"</?\w[^<>\s]*>|[^\s<]{1,20}|\s|.", text[offset:])
    return error_at(text, offset, piece[0] if piece else "", expected)
