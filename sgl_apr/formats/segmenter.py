"""A text cut into segments by the rules of its grammar; what they mean together is read in structure.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, get_args

from lark import Lark, Token, Tree, UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken
from lark.lexer import PatternStr

from sgl_apr.errors import TraceError
from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar
from sgl_apr.trajectory.spans import Role

BRANCH_RULES = ("body", "branch", "rejoin")  # text in them is the text of a branch


class Outline(NamedTuple):
    """What a fork says of one branch: its number (empty if the format has none), its text, and where it stands."""

    number: str
    text: str
    at: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text with one role, as the grammar sees it.

    `start` and `end` are offsets; `number` is what a header, result, wait or closer carries, `name` what
    a result names; `outlines` are those of a fork; `label` is the text that a close, closer or result holds.
    """

    role: Role
    start: int
    end: int
    number: str = ""
    name: str = ""
    outlines: tuple[Outline, ...] = ()
    label: str = ""


def segments(grammar: Grammar, start: str, text: str) -> list[Segment]:
    """`text` cut into segments, which cover it without gaps; raises `TraceError` where it breaks the grammar."""
    return list(iter_segments(grammar, parse_tree(grammar, start, text)))


def parse_tree(grammar: Grammar, start: str, text: str) -> Tree[Token]:
    """Lark's tree of `text`, read as rule `start`."""
    parser = grammar.parser(start)
    try:
        return parser.parse(text)
    except UnexpectedInput as error:
        raise _trace_error(parser, error, text) from None


def iter_segments(grammar: Grammar, tree: Tree[Token], *, keep_empty: bool = False) -> Iterator[Segment]:
    """The segments of a tree, in the order of the text; empty ones only where something was put in."""
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
        if rule in _WHOLE_ROLES:
            if found := _whole(grammar, node, _WHOLE_ROLES[rule]):
                yield found
        else:
            in_branch = in_branch or rule in BRANCH_RULES
            stack += [(child, in_branch) for child in reversed(node.children)]


def _whole(grammar: Grammar, node: Tree[Token], role: Role) -> Segment | None:
    first, last = _boundary_token(node, first=True), _boundary_token(node, first=False)
    if first is None or last is None:  # it is empty
        return None
    start, end = first.start_pos or 0, last.end_pos or 0
    if role == "fork":
        return Segment(role, start, end, outlines=tuple(_outlines(grammar, node)))
    found = _tokens(grammar, node)
    return Segment(
        role,
        start,
        end,
        number=str(found.get(NUMBER, "")),
        name=str(found.get("", "")),
        label=str(found.get(TEXT, "")).strip(),
    )


def _boundary_token(node: Tree[Token], *, first: bool) -> Token | None:
    """The first or last token of a tree, if it has any."""
    for child in node.children if first else reversed(node.children):
        token = child if isinstance(child, Token) else _boundary_token(child, first=first)
        if token is not None:
            return token
    return None


# Rules that are one segment each.
_WHOLE_ROLES: dict[str, Role] = {r: r for r in get_args(Role) if r not in ("prompt", "text", "body")}
_WHOLE_ROLES["failure"] = "result"


def _outlines(grammar: Grammar, fork: Tree[Token]) -> Iterator[Outline]:
    for outline in [c for c in fork.children if isinstance(c, Tree)] or [fork]:
        found = _tokens(grammar, outline)
        text = found.get(TEXT, found.get(""))
        if text is not None:
            first = found.get(NUMBER, text)
            yield Outline(str(found.get(NUMBER, "")), str(text).strip(), first.start_pos or 0)


def _tokens(grammar: Grammar, node: Tree[Token]) -> dict[str, Token]:
    """The number, the text and, under "", what any other terminal names; the first of each."""
    found: dict[str, Token] = {}
    tokens = [child for child in node.children if isinstance(child, Token)]
    if len(tokens) < len(node.children):
        tokens = list(node.scan_values(lambda v: isinstance(v, Token)))
    for token in tokens:
        if token.type in (NUMBER, TEXT):
            found.setdefault(token.type, token)
        elif isinstance(grammar.terminals.get(token.type), str):
            found.setdefault("", token)
    return found


def error_at(text: str, offset: int, found: str, expected: list[str]) -> TraceError:
    """A `TraceError` with the line and column of an offset."""
    line = text.count("\n", 0, offset) + 1
    return TraceError(line, offset - (text.rfind("\n", 0, offset) + 1) + 1, found, expected)


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
