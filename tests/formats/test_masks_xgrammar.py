"""Masks in xgrammar: the same texts as in llguidance, with tags as tokens only."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import xgrammar
from transformers import PreTrainedTokenizerFast

import sgl_apr as apr
from tests.formats import test_masks_llguidance
from tests.support.masked_sampler import Masked

TABLE = next(
    mark.args[1]
    for mark in test_masks_llguidance.test_phase.pytestmark
    if mark.args[0] == ("phase", "text", "accepted")
)
EVERY_TAG = tuple(dict.fromkeys(t for n in apr.dialect_names() for t in apr.dialect(n).tags))


@cache
def masked() -> Masked:
    return Masked(EVERY_TAG)


@cache
def compiler() -> xgrammar.GrammarCompiler:
    """One compiler for all tests, as a server has one: its cache must not confuse grammars."""
    fast = PreTrainedTokenizerFast(tokenizer_object=masked().backend, eos_token="<eos>")
    size, eos = masked().backend.get_vocab_size(), list(masked().eos_ids)
    return xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo.from_huggingface(fast, vocab_size=size, stop_token_ids=eos)
    )


def matcher(phase: str, name: str = "threadweaver", **options) -> xgrammar.GrammarMatcher:
    text = apr.dialect(name).lower(phase, masked(), "xgrammar", **options)
    return xgrammar.GrammarMatcher(compiler().compile_grammar(text))


def accepts(phase: str, text: str, name: str = "threadweaver", **options) -> bool:
    at = matcher(phase, name, **options)
    ids = masked().backend.encode(text).ids
    return all(at.accept_token(i) for i in ids) and at.accept_token(next(iter(masked().eos_ids)))


def allowed_tags(at: xgrammar.GrammarMatcher) -> set[str]:
    size = masked().backend.get_vocab_size()
    bits = xgrammar.allocate_token_bitmask(1, size)
    at.fill_next_token_bitmask(bits)
    ids = np.unpackbits(bits.numpy().view(np.uint8), bitorder="little")[:size]
    return {tag for tag in EVERY_TAG if ids[masked().special_token_id(tag)]}


@pytest.mark.parametrize(("phase", "text", "accepted"), TABLE)
def test_phase_as_on_llguidance(phase: str, text: str, accepted: bool):
    assert accepts(phase, text) is accepted


def test_options():
    assert [n for n in range(1, 9) if accepts("trunk", test_masks_llguidance.FORK.replace(": x", ":" + "x" * n), outline_chars=5)] == [
        1, 2, 3, 4, 5
    ]  # fmt: skip
    assert not accepts("trunk", "an answer", fork="required")
    assert not accepts("trunk", test_masks_llguidance.FORK, fork="forbidden")
    assert not accepts("body", " a < b\n</Thread>", forbid_angle_brackets=True)


def test_no_tag_in_free_text():
    at = matcher("body")
    for character in " x < y":
        assert at.accept_token(masked().backend.encode(character).ids[0])
    assert not allowed_tags(at) & set(apr.dialect("threadweaver").tags) - {"</Thread>"}


def test_grammars_that_differ_only_in_tags_are_not_confused():
    """xgrammar's cache does not distinguish `<JOIN-1>` and `<JOIN-2>`."""
    for number in ("1", "2", "3", "1"):
        at = matcher("trunk", "asyncthink", number="4", waiting=(number,), fork="forbidden")
        assert allowed_tags(at) & set(apr.dialect("asyncthink").tags) == {f"<JOIN-{number}>"}


def test_spelled_tags_are_an_error():
    with pytest.raises(
        apr.GrammarError, match=r"is not one token of this tokenizer.*expected a tokenizer with"
    ):
        apr.dialect("threadweaver").lower("trunk", apr.ByteTokenizer(), "xgrammar")


@pytest.mark.parametrize("name", apr.dialect_names())
def test_every_phase_compiles(name: str):
    dialect = apr.dialect(name)
    for phase in ("trunk", "after", "branch", "rejoin"):
        if dialect.rule_for_phase(phase) in dialect.grammar.rules:
            waiting = ("1",) if dialect.asynchronous and phase in ("trunk", "after") else ()
            assert not matcher(phase, name, number="2", waiting=waiting).is_terminated()
