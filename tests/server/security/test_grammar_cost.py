"""Grammars that llguidance is slow for end their own request; those of the package and JSON schemas do not."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from llguidance import LLMatcher, grammar_from
from sglang.srt.constrained import llguidance_backend

import sgl_apr as apr
from sgl_apr.formats import dialect_names
from sgl_apr.server.security import grammar_cost
from tests.support.masked_sampler import masked

AMBIGUOUS = 'root ::= a "Z"\na ::= a a a | a a | "1"'
CUBIC = (
    'root ::= a "Z"\na ::= '
    + " | ".join(f"b{i}" for i in range(150))
    + ' | "1"\n'
    + "\n".join(f"b{i} ::= a a" for i in range(150))
)
TOKENIZER = masked("threadweaver", True)


@pytest.fixture(autouse=True)
def _nothing_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammar_cost, "_refused", type(grammar_cost._refused)())
    monkeypatch.setattr(grammar_cost, "_time_each", False)


def make(text: str, tokenizer=TOKENIZER):
    """A grammar as SGLang has it, made with the hook."""
    grammar = llguidance_backend.GuidanceGrammar.__new__(llguidance_backend.GuidanceGrammar)
    init = getattr(
        llguidance_backend.GuidanceGrammar.__init__,
        "__wrapped__",
        llguidance_backend.GuidanceGrammar.__init__,
    )
    grammar_cost.make_grammar(init, grammar, tokenizer.guide, text)
    return grammar


def step(grammar, token: int, tokenizer=TOKENIZER) -> float:
    mask = torch.zeros(1, (tokenizer.guide.vocab_size + 31) // 32, dtype=torch.int32)
    start = time.thread_time()
    grammar_cost.fill_mask(llguidance_backend.GuidanceGrammar.fill_vocab_mask, grammar, mask, 0)
    grammar_cost.accept_token(llguidance_backend.GuidanceGrammar.accept_token, grammar, token)
    return time.thread_time() - start


def try_step(grammar, token: int) -> float:
    try:
        return step(grammar, token)
    except ValueError:
        return 0.0


def test_an_ambiguous_grammar_ends_with_an_error_before_it_is_slow():
    grammar = make(grammar_from("ebnf", AMBIGUOUS))
    one, worst = TOKENIZER.encode("1")[0], 0.0
    while not grammar.ll_matcher.is_error():
        worst = max(worst, try_step(grammar, one))
    assert worst < 0.1  # 14 ms on an idle machine; without limits, 0.1 s at token 240 and rising
    # SGLang would take the token that llguidance now allows for the end of the text.
    with pytest.raises(ValueError, match="too ambiguous"):
        step(grammar, next(iter(TOKENIZER.eos_ids)))


def test_a_grammar_that_is_slow_within_one_position_is_refused(monkeypatch: pytest.MonkeyPatch):
    text = grammar_from("ebnf", CUBIC.replace("root ::= ", 'root ::= "x" '))
    grammar, copy = make(text), make(text)
    monkeypatch.setattr(grammar_cost, "EXCESS_S", 0.0)
    monkeypatch.setattr(grammar_cost, "STEP_S", 0.01)
    with pytest.raises(ValueError, match="for its first token"):
        make(grammar_from("ebnf", CUBIC))
    x = TOKENIZER.encode("x")[0]
    with pytest.raises(ValueError, match="takes too long"):
        step(grammar, x)  # llguidance also parses what has to follow
    with pytest.raises(ValueError, match="takes too long"):  # another request with the same grammar, at once
        step(copy, x)
    with pytest.raises(ValueError, match="was too slow before"):
        make(text)


def test_a_slow_batch_is_followed_by_one_that_is_timed_mask_by_mask(monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []
    grammar = SimpleNamespace(
        serialized_grammar="g", fill_vocab_mask=lambda mask, row: rows.append(row), ll_matcher=None
    )
    entries = [SimpleNamespace(row=row, grammar=grammar) for row in range(2)]
    grammar_cost.fill_masks(lambda *_: time.sleep(0.2), entries, None)
    assert rows == []
    grammar_cost.fill_masks(lambda *_: pytest.fail("not one by one"), entries, None)
    assert rows == [0, 1]
    grammar_cost.fill_masks(lambda *_: None, entries, None)
    assert rows == [0, 1]


@pytest.mark.parametrize("spelled", [False, True], ids=["tokens", "text"])
@pytest.mark.parametrize("name", dialect_names())
def test_dialects_of_full_width_stay_within_the_limits(name: str, spelled: bool):
    dialect, tokenizer = apr.dialect(name), masked(name, spelled)
    for phase in ("trunk", *(() if spelled else ("trace",))):
        try:
            text = dialect.llguidance(phase, tokenizer, width=dialect.max_width or 50)
        except apr.GrammarError:
            continue
        grammar = make(text, tokenizer)
        for token in tokenizer.encode("Let me see. 12 + 3"):
            mask = grammar.ll_matcher.compute_bitmask()
            if mask[token // 8] >> token % 8 & 1:
                step(grammar, token, tokenizer)
        assert not grammar.ll_matcher.is_error()


def test_json_schemas_stay_within_the_limits():
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}
    value = json.dumps({"p0": "a", "p299": "b"})
    grammar = make(LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    for token in TOKENIZER.encode(value):
        step(grammar, token)
    assert grammar.ll_matcher.is_accepting()
