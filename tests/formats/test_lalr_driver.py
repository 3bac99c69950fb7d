"""The driver over Lark's tables is equal to Lark: the same tree of every text, and the same error at the same place."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from typing import get_args

import pytest
from lark import Lark, Token, Tree, UnexpectedInput
from lark.lexer import PatternRE, TerminalDef

import sgl_apr as apr
from sgl_apr.errors import TraceError
from sgl_apr.formats.grammar import TEXT, Grammar
from sgl_apr.formats.lalr_driver import LalrParser, Lexeme, Part
from sgl_apr.formats.segmenter import split_segments
from sgl_apr.trajectory.spans import Role
from tests.formats.test_grammar_fuzz import SOURCES, mutated
from tests.support.document_strategies import PIECES, document, tags

ROLES = set(get_args(Role)) - {"prompt", "text", "body"}  # each rule of such a name is one segment
BUILT_IN = [apr.dialect(name) for name in apr.dialect_names()]


@cache
def lark(grammar: Grammar, start: str) -> Lark:
    """The parser of a rule as Lark makes it, with a TEXT that looks for a tag at every character."""

    def exclude_tags(terminal: TerminalDef) -> None:
        if terminal.name == TEXT:
            marks = "|".join(re.escape(t) for t in sorted(grammar.tag_literals, key=len, reverse=True))
            terminal.pattern = PatternRE(rf"(?:(?!{marks})[\s\S])+" if marks else r"[\s\S]+")

    return Lark(
        grammar.source,
        parser="lalr",
        start=start,
        keep_all_tokens=True,
        maybe_placeholders=False,
        edit_terminals=exclude_tags,
    )


def flattened(tree: Tree[Token]) -> tuple[list[Lexeme], list[Part]]:
    """The tokens of a tree of Lark, and its nodes as the driver has them: each after those inside it."""
    tokens: list[Lexeme] = []
    parts: list[Part] = []

    def visit(node: Tree[Token]) -> None:
        first, first_inside = len(tokens), len(parts)
        for child in node.children:
            if isinstance(child, Token):
                tokens.append((child.type, str(child), child.start_pos or 0, child.end_pos or 0))
            else:
                visit(child)
        parts.append((str(node.data), first, len(tokens), first_inside))

    visit(tree)
    return tokens, parts


def leaves(tree: Tree[Token]) -> list[Token]:
    return list(tree.scan_values(lambda value: isinstance(value, Token)))


def segments(tree: Tree[Token] | Token, in_branch: bool = False) -> Iterator[tuple[str, int, int]]:
    """Role, start and end of each segment of a tree, from the top down."""
    if isinstance(tree, Token):
        role = "closer" if tree.type != TEXT else "body" if in_branch else "text"
        yield role, tree.start_pos or 0, tree.end_pos or 0
    elif (rule := "result" if tree.data == "failure" else str(tree.data)) in ROLES:
        if tokens := leaves(tree):
            yield rule, tokens[0].start_pos or 0, tokens[-1].end_pos or 0
    else:
        for child in tree.children:
            yield from segments(child, in_branch or tree.data in ("body", "branch", "rejoin"))


def outlines(tree: Tree[Token]) -> list[tuple[str, str]]:
    """Number and text of the outlines of all forks."""
    result: list[tuple[str, str]] = []
    for fork in [node for node in tree.iter_subtrees_topdown() if node.data == "fork"]:
        for outline in [c for c in fork.children if isinstance(c, Tree)] or [fork]:
            values = {t.type: str(t) for t in reversed(leaves(outline))}
            text = values.get("TEXT", values.get("NODE"))
            if text is not None:
                result.append((values.get("NUMBER", ""), text.strip()))
    return result


def check(grammar: Grammar, start: str, text: str) -> bool:
    """Compare the driver with Lark on one text. Returns whether it matches."""
    parser = LalrParser(grammar.tables(start))
    matches = parser.parse(text)
    try:
        tree = lark(grammar, start).parse(text)
    except UnexpectedInput as error:
        assert not matches
        offset = (
            len(text) if getattr(getattr(error, "token", None), "type", "") == "$END" else error.pos_in_stream
        )
        with pytest.raises(TraceError) as raised:
            split_segments(grammar, start, text)
        lines = text[:offset].split("\n")
        assert (raised.value.line, raised.value.column) == (len(lines), len(lines[-1]) + 1)
        return False
    assert matches
    assert (parser.tokens, parser.parts) == flattened(tree)
    split = split_segments(grammar, start, text)
    assert [(s.role, s.start, s.end) for s in split] == list(segments(tree))
    assert "".join(text[s.start : s.end] for s in split) == text
    if grammar.terminals.keys() <= {"TEXT", "NUMBER", "NL", "NODE"}:
        assert [(o.number, o.text) for s in split for o in s.outlines] == outlines(tree)
    return True


def variant(dialect: apr.Dialect, text: str, rng: random.Random) -> str:
    """The text, a piece of it between tags, or one with a few places deleted, repeated or replaced."""
    if rng.random() < 0.6:
        cuts = [0, *(offset for tag in tags(dialect, text) for offset in tag.span()), len(text)]
        start, end = sorted(rng.choices(cuts, k=2))
        text = text[start:end]
    for _ in range(rng.choice((0, 0, 1, 2))):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 2, 9)))
        pieces = (text[a:b] * 2, "", rng.choice(PIECES), rng.choice(dialect.grammar.tag_literals))
        text = text[:a] + rng.choice(pieces) + text[b:]
    return text


def compare_on_documents(rounds: int, seed: int, *, every_rule: bool = False) -> None:
    rng, outcomes = random.Random(seed), list[bool]()
    for dialect in BUILT_IN:
        phases = {"trace", dialect.rule_for_phase("branch"), "after"}
        for _ in range(rounds):
            text = variant(dialect, document(dialect, rng), rng)
            rules = dialect.grammar.rules if every_rule else phases
            outcomes += [check(dialect.grammar, rule, text) for rule in rules]
    assert min(outcomes.count(True), outcomes.count(False)) > rounds, "both outcomes are compared"


def compare_on_mutated_grammars(rounds: int, seed: int) -> int:
    rng, compared = random.Random(seed), 0
    for _ in range(rounds):
        try:
            dialect = apr.Dialect.from_source("fuzzed", mutated(rng.choice(SOURCES), rng))
        except apr.GrammarError:
            continue
        marks = dialect.grammar.tag_literals or ("<A>",)
        for rule in ("trace", "after", "fork"):
            if rule not in dialect.grammar.rules:
                continue
            try:
                dialect.grammar.tables(rule)
            except apr.GrammarError:
                continue
            for _ in range(6):
                text = "".join(rng.choice((*marks, *PIECES)) for _ in range(rng.randrange(12)))
                check(dialect.grammar, rule, text)
                compared += 1
    return compared


def test_documents_and_pieces_of_them():
    compare_on_documents(8, 0)


def test_texts_of_mutated_grammars():
    assert compare_on_mutated_grammars(8, 0) > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
def test_many_documents(seed: int):
    compare_on_documents(600, seed, every_rule=True)


@pytest.mark.slow
def test_many_mutated_grammars():
    assert compare_on_mutated_grammars(600, 1) > 1000
