"""What a body's JSON may contain, by size and by field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sgl_apr.server.guard.grammar_checks import check_schema
from sgl_apr.server.guard.json_checks import chat_text, check_json
from sgl_apr.server.guard.limits import GuardLimits
from sgl_apr.server.guard.model_size import ModelSize
from sgl_apr.server.guard.refusal import RequestRefused
from tests.server.guard.hostile import combined_schema

SIZE = ModelSize(context_length=1000, prompt_chars=10_000, vocab_size=500)
LIMITS = GuardLimits()
FITS = {
    "text": {"text": "a" * 10_000, "sampling_params": {"n": 128}},
    "prompts": {"prompt": ["a"] * 1024},
    "prompts times n": {"text": ["a"] * 8, "sampling_params": [{"n": 128}] * 8},
    "ids": {"input_ids": [1] * 1000},
    "batch of ids": {"input_ids": [[1] * 1000] * 100},
    "chat": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 9000}]}], "n": 2},
    "image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a" * 50_000}}]}]},
    "images": {"text": "a", "image_data": ["a" * 50_000]},
    "session for routing": {"text": "a", "session_id": "a", "session_params": None, "rid": "a_HEALTH_CHECK"},
    "nulls": {"text": None, "n": None, "sampling_params": None, "stop_regex": None},
    "wrong types": {"text": 5, "n": "x", "sampling_params": [1, "x"], "messages": 5, "input_ids": {}},
    "long conversation": {"input": [{"role": "user", "content": "a"}] * 2000},
    "tokens to decode": {"tokens": [1] * 5000},
    "many texts": {"input": ["a" * 100] * 1000},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "text": ({"text": "a" * 10_001}, "10001.*10000.*--apr-max-prompt-chars", "text"),
    "one of many": ({"prompt": ["a", "a" * 10_001]}, "--apr-max-prompt-chars", "prompt"),
    "chat": ({"messages": [{"content": "a" * 6000}, {"content": "a" * 6000}]}, "--apr-max-prompt-chars", "messages"),
    "chat and tools": ({"messages": [{"content": "a" * 6000}], "tools": [{"d": "a" * 6000}]}, "--apr-max-prompt-chars", "tools"),
    "prompts": ({"prompt": ["a"] * 1025}, "1025.*1024.*--apr-max-prompts", "prompt"),
    "product": ({"text": ["a"] * 9, "sampling_params": {"n": 128}}, "9 x n=128.*--apr-max-prompts", "text"),
    "n": ({"n": 129}, "n is 129.*128.*--apr-max-n", "n"),
    "best_of": ({"best_of": 129}, "best_of.*--apr-max-n", "best_of"),
    "n of one": ({"sampling_params": [{}, {"n": 1e9}]}, "--apr-max-n", "n"),
    "n of vertex": ({"parameters": {"sampling_params": {"n": 1e9}}}, "--apr-max-n", "n"),
    "ids": ({"input_ids": [1] * 1001}, "1001 tokens.*1000", "input_ids"),
    "one of many ids": ({"prompt": [[1], [1] * 1001]}, "1001 tokens", "prompt"),
    "keys": ({str(i): i for i in range(50_001)}, "--apr-max-json-values", None),
    "lists": ({"x": [[]] * 50_001}, "--apr-max-json-values", None),
    "entries": ({"input_ids": [[1] * 1000] * 1001}, "1000001.*--apr-max-json-entries", None),
    "messages": ({"messages": [{"content": "a"}] * 2049}, "2049.*--apr-max-messages", "messages"),
    "messages that are numbers": ({"messages": [1] * 2049}, "2049.*--apr-max-messages", "messages"),
    "parts": ({"messages": [{"content": [{"text": "a"}] * 2048}]}, "2049.*--apr-max-messages", "messages"),
    "embeds": ({"input_embeds": [[0.5]]}, "--disable-radix-cache", "input_embeds"),
    "depth": ({"x": json.loads("[" * 101 + "]" * 101)}, "--apr-max-json-depth", None),
    "stop_regex": ({"stop_regex": "a"}, "--apr-allow-stop-regex", "stop_regex"),
    "stop_regex below": ({"sampling_params": {"stop_regex": ["a"]}}, "--apr-allow-stop-regex", "stop_regex"),
    "internal": ({"sampling_params": {"is_normalized": True}}, "set by the server", "is_normalized"),
    "stop ids": ({"sampling_params": [{"stop_token_ids": [1] * 4097}]}, "4097.*4096", "stop_token_ids"),
    "custom params": ({"sampling_params": {"custom_params": {"a": "b" * 9000, "c": ["b" * 9000] * 7}}}, "65536", "custom_params"),
    "open_session": ({"capacity_of_str_len": 1000}, "--apr-allow-sessions", "session_id"),
    "close_session": ({"session_id": "a", "rid": None}, "--apr-allow-sessions", "session_id"),
    "session": ({"text": "a", "session_params": {"id": "a"}}, "--apr-allow-sessions", "session_params"),
    "health check": ({"rid": "HEALTH_CHECK_x"}, "rid is 'HEALTH_CHECK_x'.*HEALTH_CHECK", "rid"),
    "health checks": ({"rid": ["a", "HEALTH_CHECK"]}, "rid is", "rid"),
    "health check of responses": ({"request_id": "HEALTH_CHECK_x"}, "request_id is", "request_id"),
    "health check of vertex": ({"parameters": {"rid": "HEALTH_CHECK_x"}}, "rid is", "rid"),
    "tokens": ({"tokens": [[1], [-1]]}, "tokens has -1", "tokens"),
    "grammar": ({"regex": "a" * 65_537}, "65537.*--apr-max-grammar-chars|--apr-max-prompt-chars", "regex"),
}  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_a_body_within_the_limits_passes(name: str):
    check_json(FITS[name], LIMITS, SIZE)


@pytest.mark.parametrize("name", REFUSED)
def test_a_body_above_a_limit_is_refused(name: str):
    body, message, param = REFUSED[name]
    with pytest.raises(RequestRefused, match=message) as caught:
        check_json(body, LIMITS, SIZE)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_the_operator_sets_the_limits():
    with pytest.raises(RequestRefused, match="--apr-max-n"):
        check_json({"n": 3}, GuardLimits(n=2), SIZE)
    sessions = GuardLimits(sessions=True)
    for body in ({"capacity_of_str_len": 1}, {"session_id": "a"}, {"session_params": {"id": "a"}}):
        check_json(body, sessions, SIZE)
    check_json({"stop_regex": "a"}, GuardLimits(stop_regex=True), SIZE)
    check_json({"text": "a" * 20_000}, GuardLimits(prompt_chars=20_000), SIZE)


def test_names_that_sglang_looks_up():
    size = ModelSize(
        1000,
        10_000,
        500,
        choices={"reasoning_parser": frozenset({"r1"})},
        request_fields=frozenset({"stream"}),
    )
    check_json(
        {"reasoning_parser": "r1", "instances": [{"text": "a"}], "parameters": {"stream": True}}, LIMITS, size
    )
    with pytest.raises(RequestRefused, match="reasoning_parser is 'x', expected one of r1"):
        check_json({"reasoning_parser": "x"}, LIMITS, size)
    with pytest.raises(RequestRefused, match="no parameter 'foo'"):
        check_json({"instances": [{"text": "a"}], "parameters": {"foo": 1}}, LIMITS, size)


def test_what_is_no_object_passes():
    for body in (None, 5, [], "a"):
        check_json(body, LIMITS, SIZE)


def test_the_text_of_a_chat_is_that_of_its_messages():
    body = {
        "system": "s",
        "messages": [{"role": "user", "content": [{"text": "t"}, {"image_url": {"url": "u"}}]}],
        "other": "o",
    }
    assert set(chat_text(body).split("\n")) == {"s", "user", "t"}


def test_a_schema_that_combines_alternatives_is_refused():
    check_schema(combined_schema(8))
    with pytest.raises(RequestRefused, match="512 alternatives, expected at most 256"):
        check_schema(combined_schema(9))
    defined = {
        "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(9)} | {"d9": {"anyOf": [{}, {}]}}
    }
    check_schema(json.dumps({**defined, "allOf": [{"$ref": "#/$defs/d0"}] * 8}))
    with pytest.raises(RequestRefused):
        check_schema(json.dumps({**defined, "properties": {"a": {"allOf": [{"$ref": "#/$defs/d0"}] * 9}}}))
    for text in (
        '{"allOf": [{"$ref": "#"}]}',
        '{"allOf": 5}',
        '"allOf"',
        "{",
        None,
        '{"allOf": [{"anyOf": []}]}',
    ):
        check_schema(text)
