"""Parses a text by the rules of its grammar and splits it into segments, one for each role."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, get_args

from lark import Lark, Token, Tree, UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken
from lark.lexer import PatternStr

from sgl_apr.errors import TraceError
from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar
from sgl_apr.formats.reading_progress import report_position
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


@dataclass(frozen=True, slots=True)
class Segment:
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
    return list(iter_segments(grammar, parse_tree(grammar, start, text)))


def parse_tree(grammar: Grammar, start: str, text: str) -> Tree[Token]:
    """Return Lark's tree of a text that matches rule `start`; raises `TraceError` if it does not."""
    parser = grammar.parser(start)
    try:
        interactive = parser.parse_interactive(text)
        if (state := interactive.lexer_thread.state) is not None:
            report_position(lambda: state.line_ctr.char_pos)
        tree: Tree[Token] = interactive.resume_parse()
        return tree
    except UnexpectedInput as error:
        raise _trace_error(parser, error, text) from None


def iter_segments(grammar: Grammar, tree: Tree[Token], *, keep_empty: bool = False) -> Iterator[Segment]:
    """Yield the segments of a tree in the order of the text.

    Args:
        grammar: The grammar of the tree.
        tree: The tree.
        keep_empty: Also yield segments without text, which stand for tokens that error recovery has inserted.
    """
    stack: list[tuple[Tree[Token] | Token, bool]] = [(tree, False)]
    while stack:
        node, in_branch = stack.pop()
        if isinstance(node, Token):
            start, end = node.start_pos or 0, node.end_pos or 0
            if end > start or keep_empty:
                role: Role = "closer" if node.type != TEXT else "body" if in_branch else "text"
                yield Segment(role, start, end)
            continue
        rule = str(node.data)
        if rule in _SEGMENT_RULES:
            if segment := _segment(grammar, node, _SEGMENT_RULES[rule]):
                yield segment
        else:
            in_branch = in_branch or rule in BRANCH_RULES
            stack += [(child, in_branch) for child in reversed(node.children)]


def _segment(grammar: Grammar, node: Tree[Token], role: Role) -> Segment | None:
    first, last = _boundary_token(node, first=True), _boundary_token(node, first=False)
    if first is None or last is None:
        return None
    start, end = first.start_pos or 0, last.end_pos or 0
    if role == "fork":
        return Segment(role, start, end, outlines=tuple(_outlines(grammar, node)))
    tokens = _tokens(grammar, node)
    return Segment(
        role,
        start,
        end,
        number=str(tokens.get(NUMBER, "")),
        name=str(tokens.get("", "")),
        label=str(tokens.get(TEXT, "")).strip(),
    )


def _boundary_token(node: Tree[Token], *, first: bool) -> Token | None:
    """The first or last token of a tree, if it has any."""
    for child in node.children if first else reversed(node.children):
        token = child if isinstance(child, Token) else _boundary_token(child, first=first)
        if token is not None:
            return token
    return None


# Rules that are one segment each, with its role.
_SEGMENT_RULES: dict[str, Role] = {r: r for r in get_args(Role) if r not in ("prompt", "text", "body")}
_SEGMENT_RULES["failure"] = "result"


def _outlines(grammar: Grammar, fork: Tree[Token]) -> Iterator[Outline]:
    for outline in [c for c in fork.children if isinstance(c, Tree)] or [fork]:
        tokens = _tokens(grammar, outline)
        text = tokens.get(TEXT, tokens.get(""))
        if text is not None:
            first = tokens.get(NUMBER, text)
            yield Outline(str(tokens.get(NUMBER, "")), str(text).strip(), first.start_pos or 0)


def _tokens(grammar: Grammar, node: Tree[Token]) -> dict[str, Token]:
    """The first number, the first text, and under "" the first match of any other regular expression."""
    by_type: dict[str, Token] = {}
    tokens = [child for child in node.children if isinstance(child, Token)]
    if len(tokens) < len(node.children):
        tokens = list(node.scan_values(lambda v: isinstance(v, Token)))
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
