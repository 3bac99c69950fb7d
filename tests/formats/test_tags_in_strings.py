"""Tags in longer strings, named terminals and regular expressions, with the tags as tokens of a real tokenizer."""

from __future__ import annotations

import pytest
import xgrammar
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerFast

import sgl_apr as apr
from sgl_apr.formats.grammar import Grammar
from sgl_apr.formats.grammar_source import split_tags
from tests.support.masked_sampler import Masked

SEPARATE = """//@ max_width 3, width 2
trace   : TEXT? (block TEXT?)*
block   : fork path+ tail close
fork    : "<Parallel>" "\\n" outline+ "</Plan>"
outline : "<Plan " NUMBER ">" "\\n" TEXT "</Item>" "\\n"
path    : header body
header  : "\\nPath: " "<Path " NUMBER ">" "\\n"
body    : TEXT "</Path>"
tail    : "\\n" "<Summary>" "\\n"
close   : TEXT "</Summary>"
trunk   : TEXT? fork | TEXT
after   : close trunk?
TEXT    : /(.|\\n)+/
NUMBER  : /[1-9][0-9]*/
"""
JOINED = (
    SEPARATE.replace('"<Parallel>" "\\n" outline+', "OPEN outline+")
    .replace('"<Plan " NUMBER ">" "\\n"', 'PLAN NUMBER ">\\n"')
    .replace('"</Item>" "\\n"', '"</Item>\\n"')
    .replace('"\\nPath: " "<Path " NUMBER ">" "\\n"', '"\\nPath: <Path " NUMBER ">\\n"')
    .replace('"\\n" "<Summary>" "\\n"', '("\\n<Summary>\\n")')
    + 'OPEN : "<Parallel>\\n"\nPLAN : "<Plan "\n'
)
TRACE = (
    "Two ways.<Parallel>\n<Plan 1>\na</Item>\n<Plan 2>\nb</Item>\n</Plan>\nPath: <Path 1>\nx</Path>\nPath: <Path 2>\ny"
    "</Path>\n<Summary>\nz</Summary>end"
)


@pytest.fixture(scope="module")
def joined() -> apr.Dialect:
    return apr.Dialect.from_source("joined", JOINED)


@pytest.fixture(scope="module")
def separate() -> apr.Dialect:
    return apr.Dialect.from_source("separate", SEPARATE)


def test_tags_are_found_and_traces_are_the_same(joined: apr.Dialect, separate: apr.Dialect):
    assert joined.tags == separate.tags
    assert {"<Parallel>", "<Plan 1>", "<Plan 3>", "</Item>", "<Path 1>", "<Summary>"} <= {*joined.tags}
    spans = [(s.role, s.text) for s in separate.parse(TRACE).spans]
    assert [(s.role, s.text) for s in joined.parse(TRACE).spans] == spans
    assert joined.parse(TRACE).text == TRACE
    assert joined.grammar.render_rule("header", "2") == "\nPath: <Path 2>\n"


@pytest.mark.parametrize("backend", ["llguidance", "xgrammar"])
@pytest.mark.parametrize("phase", ["trunk", "after", "branch"])
def test_masks_are_the_same(joined: apr.Dialect, separate: apr.Dialect, backend: str, phase: str):
    tokens = Masked(separate.tags)
    mask = joined.lower(phase, tokens, backend)
    assert mask == separate.lower(phase, tokens, backend)
    assert "<Parallel>" not in mask, "as its token"


FORK = "<Parallel>\n<Plan 1>\na</Item>\n<Plan 2>\nb</Item>\n</Plan>"
CASES = [
    ("trunk", f"Two ways.{FORK}", True),
    ("trunk", FORK.replace("</Item>", "</item>", 1), False),
    ("trunk", FORK.replace("<Parallel>\n", "<Parallel>"), False),
    ("branch", "x</Path>", True),
    ("branch", "x<Parallel></Path>", False),
]


@pytest.mark.parametrize(("phase", "text", "accepted"), CASES)
def test_tokens_are_accepted_by_both_backends(joined: apr.Dialect, phase: str, text: str, accepted: bool):
    tokens = Masked(joined.tags)
    ids = tokens.encode(text)
    assert {tokens.special_token_id(t) for t in joined.tags if t in text} <= {*ids}, "tags are tokens"
    eos = next(iter(tokens.eos_ids))
    guide = LLMatcher(tokens.guide, joined.lower(phase, tokens, "llguidance"))
    assert (guide.try_consume_tokens(ids) == len(ids) and guide.is_accepting()) is accepted
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens.backend, eos_token="<eos>")
    size = tokens.backend.get_vocab_size()
    info = xgrammar.TokenizerInfo.from_huggingface(fast, vocab_size=size, stop_token_ids=[eos])
    compiled = xgrammar.GrammarCompiler(info).compile_grammar(joined.lower(phase, tokens, "xgrammar"))
    matcher = xgrammar.GrammarMatcher(compiled)
    assert (all(map(matcher.accept_token, ids)) and matcher.accept_token(eos)) is accepted


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"<Parallel>" "\\n"', "OPEN", r"line 15: terminal OPEN: the regular expression holds a tag"),
        ('TEXT "</Path>"', 'TEXT "End: </Path>"', r"line 8: rule body: 'End: ' follows TEXT, expected a tag"),
        ('TEXT "</Path>"', 'TEXT END "</Path>"', r"line 8: rule body: '\\n' follows TEXT, expected a tag"),
        (
            'TEXT "</Path>"',
            'TEXT NUMBER "</Path>"',
            r"line 8: rule body: NUMBER follows TEXT, expected a tag",
        ),
    ],
)
@pytest.mark.parametrize(
    "pattern", [r"<Parallel>\n", r"<(Parallel|Split)>", r"\<[A-Z][a-z]+>", r"[<]\/?Parallel>"]
)
def test_what_cannot_be_a_token_is_refused_with_its_line(old: str, new: str, message: str, pattern: str):
    source = SEPARATE.replace(old, new) + f"OPEN : /{pattern}/\n" * ("OPEN" in new) + 'END : "\\n"\n'
    with pytest.raises(apr.GrammarError, match=rf"mine\.lark, {message}"):
        apr.Dialect.from_source("mine", source)


def test_a_regular_expression_with_a_comparison_is_no_tag():
    assert Grammar('a: "<x>" OP NAME\nTEXT: /x/\nOP: /<=|<|>/\nNAME: /[a-z]+/').terminals["OP"] == "<=|<|>"


def test_strings_are_split_at_tags():
    assert split_tags("a <b> c</d><e f") == ["a ", "<b>", " c", "</d>", "<e f"]
    assert split_tags("x < y") == ["x < y"]
    assert split_tags(">\n") == [">", "\n"]
    assert split_tags("") == []
