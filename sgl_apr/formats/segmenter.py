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
from sgl_apr.formats.lalr_driver import Lexeme, Node, parse_text
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
    node = parse_text(grammar.tables(start), text)
    return None if node is None else list(iter_segments(grammar, node))


def syntax_error(grammar: Grammar, start: str, text: str) -> TraceError:
    """Return the error of a text that does not match a rule: where it departs, and what Lark expects there."""
    parser = grammar.parser(start)
    try:
        parser.parse(text)
    except UnexpectedInput as error:
        return _trace_error(parser, error, text)
    raise AssertionError(f"Lark accepts a text of {len(text)} characters that its tables do not")


def iter_segments(grammar: Grammar, tree: Node, *, keep_empty: bool = False) -> Iterator[Segment]:
    """Yield the segments of a tree in the order of the text.

    Args:
        grammar: The grammar of the tree.
        tree: The tree.
        keep_empty: Also yield segments without text, which stand for tokens that error recovery has inserted.
    """
    stack: list[tuple[Node | Lexeme, bool]] = [(tree, False)]
    while stack:
        item, in_branch = stack.pop()
        if isinstance(item, Lexeme):
            if item.end > item.start or keep_empty:
                role: Role = "closer" if item.type != TEXT else "body" if in_branch else "text"
                yield Segment(role, item.start, item.end)
        elif item.rule in _SEGMENT_RULES:
            if segment := _segment(grammar, item, _SEGMENT_RULES[item.rule]):
                yield segment
        else:
            in_branch = in_branch or item.rule in BRANCH_RULES
            stack += [(child, in_branch) for child in reversed(item.children)]


def _segment(grammar: Grammar, node: Node, role: Role) -> Segment | None:
    tokens = list(_tokens(node))
    if not tokens:
        return None
    start, end = tokens[0].start, tokens[-1].end
    if role == "fork":
        return Segment(role, start, end, outlines=tuple(_outlines(grammar, node)))
    values = _values(grammar, tokens)
    return Segment(
        role,
        start,
        end,
        number=values[NUMBER].value if NUMBER in values else "",
        name=values[""].value if "" in values else "",
        label=values[TEXT].value.strip() if TEXT in values else "",
    )


# Rules that are one segment each, with its role.
_SEGMENT_RULES: dict[str, Role] = {r: r for r in get_args(Role) if r not in ("prompt", "text", "body")}
_SEGMENT_RULES["failure"] = "result"


def _outlines(grammar: Grammar, fork: Node) -> Iterator[Outline]:
    for outline in [child for child in fork.children if isinstance(child, Node)] or [fork]:
        values = _values(grammar, _tokens(outline))
        text = values.get(TEXT, values.get(""))
        if text is not None:
            number = values.get(NUMBER)
            yield Outline(number.value if number else "", text.value.strip(), (number or text).start)


def _tokens(node: Node) -> Iterator[Lexeme]:
    """The tokens of a node in the order of the text."""
    for child in node.children:
        if isinstance(child, Lexeme):
            yield child
        else:
            yield from _tokens(child)


def _values(grammar: Grammar, tokens: Iterable[Lexeme]) -> dict[str, Lexeme]:
    """The first number, the first text, and under "" the first match of any other regular expression."""
    by_type: dict[str, Lexeme] = {}
    for token in tokens:
        if token.type in (NUMBER, TEXT):
            by_type.setdefault(token.type, token)
        elif isinstance(grammar.terminals.get(token.type), str):
            by_type.setdefault("", token)
    return by_type


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
