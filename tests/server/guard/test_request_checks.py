"""What a request to the engine may contain: the size of a batch, grammars, sessions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

import sgl_apr as apr
from sgl_apr.errors import GrammarError
from sgl_apr.server.guard.grammar_checks import check_grammar_size, check_schema
from sgl_apr.server.guard.limits import MIB, GuardLimits
from sgl_apr.server.guard.model_size import ModelSize
from sgl_apr.server.guard.refusal import RequestRefused
from sgl_apr.server.guard.request_checks import check_batch, check_request, check_texts
from sgl_apr.server.security.abort import normalize_request
from sgl_apr.trajectory.join_layout import LAYOUT_PARAM
from tests.formats.test_masks_xgrammar import masked
from tests.server.guard.hostile import chained_rules, chained_schema

LIMITS, SIZE = GuardLimits(), ModelSize(context_length=1000, prompt_chars=10_000, vocab_size=500)
STOPS = {"stop": ["ab " * 1300] * 16}  # 62 kB


def check(limits: GuardLimits = LIMITS, **fields: Any) -> None:
    check_batch(GenerateReqInput(**fields), limits)


@pytest.mark.parametrize(
    "fields",
    [
        {"text": ["a"] * 100, "sampling_params": STOPS},
        {"text": ["a"] * 100, "sampling_params": [STOPS] * 100},
        {"text": "a", "sampling_params": {**STOPS, "n": 100}},
        {"text": ["a"] * 10, "sampling_params": [{**STOPS, "n": 10}] * 10},
        {"text": ["a"] * 100, "extra_key": "k" * 50_000},
        {"text": ["a"] * 100, "sampling_params": {"custom_params": {"a": "b" * 50_000}}},
    ],
)
def test_a_batch_cannot_multiply_its_parameters(fields: dict[str, Any]):
    with pytest.raises(
        RequestRefused, match=r"of 100 sequences is \d{7}, .*at most 2097152 \(--apr-max-batch-bytes\)"
    ):
        check(**fields)
    check(GuardLimits(batch_bytes=8 * MIB), **fields)


def test_a_batch_of_embeddings_needs_an_id_for_each_prompt():
    """SGLang only asserts it."""
    with pytest.raises(RequestRefused, match="rid='a', expected a list with an id for each of 2 prompts"):
        check_batch(EmbeddingReqInput(text=["a", "b"], rid="a"), LIMITS)
    check_batch(EmbeddingReqInput(text=["a", "b"], rid=["a", "b"]), LIMITS)
    check_batch(EmbeddingReqInput(text=["a", "b"]), LIMITS)
    check_batch(EmbeddingReqInput(text="a", rid="a"), LIMITS)
    check(text=["a", "b"], rid="a")
    with pytest.raises(
        RequestRefused, match=r"do not fit one another .AssertionError: The rid should be a list"
    ):
        normalize_request(
            EmbeddingReqInput.normalize_batch_and_arguments,
            EmbeddingReqInput(image_data=[["a"], ["b"]], rid="a"),
        )


def test_batches_within_the_limit_pass():
    check(text="a", sampling_params=STOPS, extra_key="k" * 3_000_000)
    check(text=["a"] * 30, sampling_params=STOPS)
    check(text=["a"] * 1024, sampling_params={"max_new_tokens": 16, "stop": ["\n"], "temperature": 0.5})
    check(text=["a"] * 1024)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"stop_token_ids": [1] * 4097}, "stop_token_ids has 4097 entries, expected at most 4096"),
        ({"custom_params": {"a": "b" * 65_536}}, r"custom_params has 655\d\d bytes of JSON, expected at most 65536"),
        ({"custom_params": {"a": "b" * 65_536, LAYOUT_PARAM: "[1]"}}, "custom_params has"),
    ],
)  # fmt: skip
def test_long_parameters_are_refused(sampling: dict[str, Any], message: str):
    with pytest.raises(RequestRefused, match=message):
        check(text="a", sampling_params=sampling)


def test_parameters_at_their_limits_pass():
    check(text="a", sampling_params={"stop_token_ids": [1] * 4096, "custom_params": {"a": "b" * 65_000}})
    check(text="a", sampling_params={"custom_params": {LAYOUT_PARAM: "[" + "1," * 100_000 + "1]"}})


def test_sessions_need_a_flag():
    with pytest.raises(RequestRefused, match="--apr-allow-sessions") as caught:
        check(text="a", session_params={"id": "a"})
    assert caught.value.param == "session_params"
    check(GuardLimits(sessions=True), text="a", session_params={"id": "a"})
    with pytest.raises(RequestRefused, match="session_params"):
        check(GuardLimits(sessions=True), text="a", session_params={"id": 5})


def test_the_number_of_grammars_is_limited():
    grammars = [{"ebnf": chained_rules(i + 2)} for i in range(9)]
    check(text=["a"] * 8, sampling_params=grammars[:8])
    check(text=["a"] * 20, sampling_params=[grammars[0]] * 20)
    with pytest.raises(RequestRefused, match="9 different grammars, expected at most 8"):
        check(text=["a"] * 9, sampling_params=grammars)


def lark_rules(length: int, separator: str = ":") -> str:
    rules = [f"r{i}{separator} r{i + 1} r{i + 1} | r{i + 1}" for i in range(length)]
    return "\n".join(["start: r0", *rules, f'r{length}{separator} "a"'])


@pytest.mark.parametrize("separator", [":", " :", "[lazy]:", "{p}:", ".1 :"])
def test_the_rules_of_lark_count(separator: str):
    check_grammar_size(lark_rules(510, separator), LIMITS)
    with pytest.raises(RequestRefused, match=r"rules of ebnf is 513.*512.*--apr-max-grammar-chars"):
        check_grammar_size(lark_rules(511, separator), LIMITS)


def test_the_rules_of_ebnf_count():
    check_grammar_size(chained_rules(510), LIMITS)
    check_grammar_size(chained_rules(1000), GuardLimits(grammar_chars=131_072))
    check_grammar_size(None, LIMITS)
    with pytest.raises(RequestRefused, match="rules of ebnf is 513"):
        check_grammar_size(chained_rules(511), LIMITS)
    tag = json.dumps({"type": "structural_tag", "format": {"type": "grammar", "grammar": chained_rules(511)}})
    for text in (tag, tag.replace(":", "\\u003a").replace('"\\u003a', '":')):
        with pytest.raises(RequestRefused, match="rules of structural_tag"):
            check_grammar_size(text, LIMITS, "structural_tag")
    request = GenerateReqInput(text="a", sampling_params={"ebnf": chained_rules(511)})
    with pytest.raises(RequestRefused, match="rules of ebnf"):
        check_request(request, [1], LIMITS, SIZE)


@pytest.mark.parametrize("backend", ["llguidance", "xgrammar"])
def test_the_grammars_of_all_dialects_pass(backend: str):
    lowered = 0
    for name in apr.dialect_names():
        dialect = apr.dialect(name)
        options: dict[str, Any] = {
            "width": min(50, dialect.max_width),
            "waiting": tuple(map(str, range(1, 51))),
        }
        for phase in ("trunk", "after", "branch", "rejoin"):
            for tokenizer in (masked(), apr.ByteTokenizer()):
                try:
                    text = dialect.lower(phase, tokenizer, backend, **options)
                except GrammarError:  # a dialect without this phase, or a backend without spelled tags
                    continue
                check_grammar_size(text, LIMITS)
                lowered += 1
    assert lowered >= len(apr.dialect_names())


@pytest.mark.parametrize(
    "schema",
    [
        '{"allOf":[1],"x":' + "[" * 1000 + "]" * 1000 + "}",
        chained_schema(1000),
        '{"x":' * 500 + "1" + "}" * 500,
    ],
)
@pytest.mark.parametrize("name", ["json_schema", "structural_tag"])
def test_a_deep_schema_is_refused(schema: str, name: str):
    with pytest.raises(RequestRefused, match=f"{name} is nested more than 100 deep") as caught:
        check_schema(schema, name)
    assert caught.value.param == name


def test_a_schema_of_usual_depth_passes():
    check_schema(chained_schema(40))
    check_schema('{"properties":{"x":' * 40 + "{}" + "}}" * 40)


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"logprob_start_len": 0, "top_logprobs_num": 400}, False),
        ({"logprob_start_len": 0, "top_logprobs_num": 400, "sampling_params": {"n": 2}}, True),
        ({"logprob_start_len": 900, "top_logprobs_num": 400, "sampling_params": {"n": 8}}, False),
        ({"logprob_start_len": 0, "top_logprobs_num": 300, "token_ids_logprob": [1] * 200}, True),
        ({"logprob_start_len": -1, "top_logprobs_num": 400, "sampling_params": {"n": 8}}, False),
    ],
)
def test_the_log_probabilities_of_a_prompt_are_limited(fields: dict[str, Any], refused: bool):
    ids = [1] * 1000
    request = GenerateReqInput(input_ids=ids, return_logprob=True, **{"sampling_params": {}, **fields})
    if not refused:
        check_request(request, ids, LIMITS, SIZE)
        return
    with pytest.raises(RequestRefused, match="--apr-max-prompt-logprobs"):
        check_request(request, ids, LIMITS, SIZE)


@pytest.mark.parametrize("texts", ["a", ["a", "b"], [["query", "document"]], [], None])
def test_texts_that_a_tokenizer_takes(texts: object) -> None:
    check_texts(texts)


@pytest.mark.parametrize("entry", [["a"], [], ["a", "b", "c"], [["a", "b"]], ["a", 1], 5, None, {"a": 1}])
def test_a_text_that_is_neither_a_string_nor_a_pair_is_refused(entry: object) -> None:
    with pytest.raises(RequestRefused, match="expected a string, or a pair of strings for a cross-encoder"):
        check_texts([entry])
