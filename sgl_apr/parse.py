"""Text to segments and trajectories, and what would complete a text; it reads finished text and decodes nothing."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from lark import Lark, Token, Tree, UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken
from lark.lexer import PatternStr
from lark.parsers.lalr_interactive_parser import InteractiveParser

from sgl_apr.errors import TraceError
from sgl_apr.grammar import NUMBER, TEXT, Grammar
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory import Path, Role, Span, Trajectory

FILLER = "..."  # what stands where the grammar wants text and none was written


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text with one role, as the grammar sees it.

    `start` and `end` are offsets; `number` is the branch number of a header; `outlines` are the
    (number, text) pairs of a fork; `label` is a conclusion's text in a close.
    """

    role: Role
    start: int
    end: int
    number: int = 0
    outlines: tuple[tuple[int, str], ...] = ()
    label: str = ""


def segments(grammar: Grammar, start: str, text: str, max_width: int) -> list[Segment]:
    """`text` cut into segments, which cover it without gaps; raises `TraceError` where it breaks the grammar."""
    tree = read(grammar, start, text)
    found = list(_walk(tree, text, max_width))
    _check_numbers(found, text)
    return found


def read(grammar: Grammar, start: str, text: str) -> Tree[Token]:
    """Lark's tree of `text`, read as rule `start`."""
    parser = grammar.parser(start)
    try:
        return parser.parse(text)
    except UnexpectedInput as error:
        raise _trace_error(parser, error, text) from None


def _walk(node: Tree[Token] | Token, text: str, max_width: int) -> Iterator[Segment]:
    if isinstance(node, Token):
        if node.type == TEXT and node.end_pos is not None:
            yield Segment("text", node.start_pos or 0, node.end_pos)
        return
    if node.meta.empty:
        return
    start, end = node.meta.start_pos, node.meta.end_pos
    match str(node.data):
        case "fork":
            outlines = tuple(_outlines(node))
            for expected, (number, _, token) in enumerate(outlines, 1):
                if number != expected or number > max_width:
                    want = f'"{expected}"' if expected <= max_width else f"at most {max_width} outlines"
                    raise TraceError(token.line or 1, token.column or 1, str(token), [want])
            yield Segment("fork", start, end, outlines=tuple((n, label) for n, label, _ in outlines))
        case "header":
            token = next(t for t in node.scan_values(lambda v: isinstance(v, Token)) if t.type == NUMBER)
            yield Segment("header", start, end, number=int(token))
        case "body":
            closer = node.children[-1]
            assert isinstance(closer, Token)
            assert closer.start_pos is not None
            for child in node.children[:-1]:
                for segment in _walk(child, text, max_width):
                    yield segment if segment.role != "text" else Segment("body", segment.start, segment.end)
            yield Segment("closer", closer.start_pos, end)
        case "lead" | "tail" as role:
            yield Segment("lead" if role == "lead" else "tail", start, end)
        case "close":
            labels = [str(t) for t in node.scan_values(lambda v: isinstance(v, Token)) if t.type == TEXT]
            yield Segment("close", start, end, label="".join(labels).strip())
        case _:
            for child in node.children:
                yield from _walk(child, text, max_width)


def _outlines(fork: Tree[Token]) -> Iterator[tuple[int, str, Token]]:
    for outline in fork.find_data("outline"):
        tokens = {t.type: t for t in outline.children if isinstance(t, Token)}
        yield int(tokens[NUMBER]), str(tokens[TEXT]).strip(), tokens[NUMBER]


def _check_numbers(found: list[Segment], text: str) -> None:
    """Branches carry the numbers of their outlines, in the same order, one each."""
    wanted: list[int] = []
    for segment in found:
        if segment.role == "fork":
            wanted = [n for n, _ in segment.outlines]
        elif segment.role == "header":
            if not wanted or segment.number != wanted.pop(0):
                raise _at(
                    text,
                    segment.start,
                    text[segment.start : segment.end],
                    ["the branch that is next in the outlines"],
                )
        elif segment.role == "tail" and wanted:
            raise _at(text, segment.start, "", [f"branch {wanted[0]}, which has an outline"])


def _at(text: str, offset: int, found: str, expected: list[str]) -> TraceError:
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
        return _at(text, len(text), "", expected)
    piece = re.match(r"</?\w[^<>\s]*>|[^\s<]{1,20}|\s|.", text[offset:])
    return _at(text, offset, piece[0] if piece else "", expected)


def completion(grammar: Grammar, start: str, text: str) -> str | None:
    """The shortest text that makes `text` a whole `start`, or None if it can't become one.

    Used where decoding was cut: it closes what is open, in grammar order, and puts `FILLER` only
    where the grammar wants text and there is none.
    """
    interactive = grammar.parser(start).parse_interactive(text)
    added, count = "", 0
    try:
        for token in interactive.iter_parse():
            count += token.type == NUMBER
    except UnexpectedInput as error:
        # The text may end within a fixed piece, such as half a tag: finish that first.
        rest = text[error.pos_in_stream :] if error.pos_in_stream is not None else ""
        fixed = next((t for t in _fixed(grammar, start, interactive) if rest and t.startswith(rest)), None)
        if fixed is None:
            return None
        interactive.feed_token(fixed)
        added = str(fixed)[len(rest) :]
    if not added and "$END" not in interactive.accepts():
        for begun in _begun(list(_fixed(grammar, start, interactive)), text):
            more = completion(grammar, start, text + begun)
            if more is not None:
                return begun + more
    queue = deque([(interactive, added, count)])
    for _ in range(200):
        if not queue:
            return None
        state, added, count = queue.popleft()
        accepted = state.accepts()
        if "$END" in accepted:
            return added
        steps = list(_fixed(grammar, start, state))
        if NUMBER in accepted:
            steps.append(Token(NUMBER, str(count + 1)))
        if TEXT in accepted and not steps:
            steps.append(Token(TEXT, FILLER))
        for token in steps:
            following = state.copy()
            following.feed_token(token)
            queue.append((following, added + str(token), count + (token.type == NUMBER)))
    return None


def _begun(options: list[Token], text: str) -> Iterator[str]:
    """What is missing of each option that `text` ends with the beginning of: "ead>" behind "</Thr"."""
    for option in options:
        for known in range(len(option) - 1, 1, -1):
            if text.endswith(option[:known]):
                yield str(option[known:])


def _fixed(grammar: Grammar, start: str, state: InteractiveParser) -> Iterator[Token]:
    """The fixed texts that the parser would take next."""
    accepted = state.accepts()
    for terminal in grammar.parser(start).terminals:
        if terminal.name in accepted and isinstance(terminal.pattern, PatternStr):
            yield Token(terminal.name, terminal.pattern.value)


def trajectory(found: list[Segment], text: str, dialect: str, tokenizer: Tokenizer | None) -> Trajectory:
    """A trajectory read from a whole trace. All of it counts as decoded; ids only with a tokenizer."""
    spans: list[Span] = []
    ids = _split(text, [s.end for s in found], tokenizer)
    # One frame per open block: its path, its outlines, the span before the branches, the ends of the branches.
    path: Path = ()
    blocks = 0
    tip: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()
    ends: list[int] = []
    labels: dict[int, str] = {}
    for segment, token_ids in zip(found, ids, strict=True):
        label = segment.label
        if segment.role == "fork":
            blocks += 1
            labels = dict(segment.outlines)
        if segment.role == "header":
            lead = lead or tip
            path, tip, label = (blocks, segment.number), lead, labels.get(segment.number, "")
        if segment.role == "tail":
            path, tip, lead, ends = (), tuple(ends), (), []
        spans.append(
            Span(
                role=segment.role,
                origin="decoded",
                text=text[segment.start : segment.end],
                token_ids=token_ids,
                parents=tip,
                path=path,
                label=label,
                finish="stop" if segment.role == "closer" else None,
            )
        )
        tip = (len(spans) - 1,)
        if segment.role == "closer":
            ends.append(len(spans) - 1)
    return Trajectory(tuple(spans), dialect)


def _split(text: str, ends: list[int], tokenizer: Tokenizer | None) -> list[tuple[int, ...] | None]:
    """The ids of each piece; a token belongs to the piece in which it begins."""
    if tokenizer is None:
        return [None] * len(ends)
    return list(split_ids(tokenizer.encode(text), text, ends, tokenizer))


def split_ids(
    ids: list[int] | tuple[int, ...], text: str, ends: list[int], tokenizer: Tokenizer
) -> Iterator[tuple[int, ...]]:
    """Cut `ids`, whose text is `text`, at the offsets `ends`; a token belongs where its first character lies."""
    starts: list[int] = []
    offset, done = 0, 0
    for i in range(len(ids)):
        starts.append(offset)
        piece = tokenizer.decode(ids[done : i + 1], ids[:done])
        if not piece.endswith("\ufffd") or (text.startswith(piece, starts[done]) and i + 1 == len(ids)):
            # A character is whole: bytes before it share its start.
            offset = starts[done] + len(piece)
            done = i + 1
    at = 0
    for k, end in enumerate(ends):
        upto = at
        while upto < len(ids) and (starts[upto] < end or k == len(ends) - 1):
            upto += 1
        yield tuple(ids[at:upto])
        at = upto
