"""The driver over Lark's tables is equal to Lark: the same tree of every text, and the same error at the same place."""

from __future__ import annotations

import random
import re
from functools import cache

import pytest
from lark import Lark, Token, Tree, UnexpectedInput
from lark.lexer import PatternRE, TerminalDef

import sgl_apr as apr
from sgl_apr.errors import TraceError
from sgl_apr.formats.grammar import TEXT, Grammar
from sgl_apr.formats.lalr_driver import Lexeme, Node, parse_text
from sgl_apr.formats.segmenter import split_segments
from tests.formats.test_grammar_fuzz import SOURCES, mutated
from tests.support.document_strategies import PIECES, document, tags

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


def node(tree: Tree[Token]) -> Node:
    """A tree of Lark, as the driver writes it."""
    return Node(
        str(tree.data),
        [
            Lexeme(c.type, str(c), c.start_pos or 0, c.end_pos or 0) if isinstance(c, Token) else node(c)
            for c in tree.children
        ],
    )


def check(grammar: Grammar, start: str, text: str) -> bool:
    """Compare the driver with Lark on one text. Returns whether it matches."""
    try:
        expected = node(lark(grammar, start).parse(text))
    except UnexpectedInput as error:
        assert parse_text(grammar.tables(start), text) is None
        offset = (
            len(text) if getattr(getattr(error, "token", None), "type", "") == "$END" else error.pos_in_stream
        )
        with pytest.raises(TraceError) as raised:
            split_segments(grammar, start, text)
        lines = text[:offset].split("\n")
        assert (raised.value.line, raised.value.column) == (len(lines), len(lines[-1]) + 1)
        return False
    assert parse_text(grammar.tables(start), text) == expected
    assert "".join(text[s.start : s.end] for s in split_segments(grammar, start, text)) == text
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
    rng = random.Random(seed)
    for dialect in BUILT_IN:
        phases = {"trace", dialect.rule_for_phase("branch"), "after"}
        outcomes = [
            check(dialect.grammar, rule, text)
            for _ in range(rounds)
            for text in [variant(dialect, document(dialect, rng), rng)]
            for rule in (dialect.grammar.rules if every_rule else phases)
        ]
        assert min(outcomes.count(True), outcomes.count(False)) > rounds // 8, "both outcomes are compared"


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
    compare_on_documents(16, 0)


def test_texts_of_mutated_grammars():
    assert compare_on_mutated_grammars(10, 0) > 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
def test_many_documents(seed: int):
    compare_on_documents(600, seed, every_rule=True)


@pytest.mark.slow
def test_many_mutated_grammars():
    assert compare_on_mutated_grammars(600, 1) > 1000
