"""The grammar file: what is read from it, and what is an error."""

from __future__ import annotations

import pytest

import sgl_apr as apr
from sgl_apr.formats.dialects import dialect_names
from sgl_apr.formats.grammar import Grammar, grammar_path

SOURCE = grammar_path("threadweaver").read_text()


def test_the_file_is_short_and_holds_every_tag():
    grammar = Grammar(SOURCE)
    assert len(grammar.tags()) == 10
    assert grammar.render_rule("header", "3") == "<Thread>\n3:"
    assert grammar.render_rule("lead") == grammar.render_rule("tail") == "\n"
    assert grammar.closing_literal("fork") == "</Outlines>"


def test_no_module_spells_a_tag():
    package = grammar_path("threadweaver").parents[1] / "sgl_apr"
    tags = Grammar(SOURCE).tags()
    sources = [p for p in package.rglob("*.py") if "models" not in p.parts]
    spelled = [(p.name, tag) for p in sources for tag in tags if f'"{tag}"' in p.read_text()]
    assert [s for s in spelled if s[0] != "scripted.py"] == []  # its doctest contains one


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a: b~2..3\nTEXT: /x/", "line 1.*`~` counts"),
        ("a: TEXT\n%ignore X\nTEXT: /x/", "line 2.*ignore is not supported"),
        ("a: TEXT\nTEXT: /x(?=y)/", "line 2.*look-around"),
        ("a: TEXT\nTEXT :: x", "line 2: expected Lark syntax, found 'TEXT :: x'"),
        ("a{x}: x\nTEXT: /x/", "line 1.*templates"),
        ("a.2: TEXT\nTEXT: /x/", "line 1.*priorities"),
        ("a: TEXT -> b\nTEXT: /x/", "line 1.*aliases"),
        ('a: "x"i\nTEXT: /x/', "line 1.*flags"),
        ('a: "x"', "no terminal TEXT"),
        ("a: TEXT? /b/\nTEXT: /x/", "line 1: rule a: a regular expression in a rule"),
        ("a: TEXT\na: TEXT\nTEXT: /x/", "line 2: a is already defined in line 1"),
        ("a: TEXT\nTEXT: /(/", "line 2: terminal TEXT: not a valid regular expression"),
        ('a: TEXT\nTEXT: "x"', "line 2: terminal TEXT: expected a regular expression"),
        ('a: TEXT\nTEXT: /x/\nB: "x" | "y"', "line 3.*expected one string or one regular expression"),
    ],
)
def test_unsupported_syntax_is_an_error_with_line_and_reason(source: str, message: str):
    with pytest.raises(apr.GrammarError, match=message):
        Grammar(source, "mine.lark")


def test_an_undefined_rule_is_named():
    with pytest.raises(apr.GrammarError, match="'b' used but not defined"):
        Grammar("a: TEXT b\nTEXT: /x/").parser("a")
    with pytest.raises(apr.GrammarError, match="no rule 'nope', expected one of"):
        Grammar(SOURCE).parser("nope")


def test_unknown_dialect_lists_the_known_ones(tmp_path):
    assert "threadweaver" in dialect_names()
    with pytest.raises(apr.GrammarError, match=r"no dialect .nope., expected.*threadweaver"):
        apr.dialect("nope")
    with pytest.raises(apr.GrammarError, match="cannot read the grammar"):
        apr.Dialect.from_file(tmp_path / "absent.lark")
