"""Every field that a client can send is in a table: none is ignored."""

from __future__ import annotations

import re

import pytest
from anthropic.types.message_create_params import MessageCreateParamsBase
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase

import sgl_apr as apr
from sgl_apr.server.api.apr_routes import has_apr, takes_apr
from sgl_apr.server.api.compatible.messages_request import MESSAGES_FIELDS
from sgl_apr.server.api.compatible.responses_request import RESPONSES_FIELDS
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.server.api.openai.fields import OPENAI_FIELDS
from sgl_apr.server.api.openai.reasoning_effort import EFFORTS, effort_options
from sgl_apr.server.api.openai.request_fields import FieldTable
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.models import builtin_path
from tests.support.paths import ROOT

CLIENTS = [
    (ChatParams, OPENAI_FIELDS), (TextParams, OPENAI_FIELDS), (ResponseCreateParamsBase, RESPONSES_FIELDS),
    (MessageCreateParamsBase, MESSAGES_FIELDS),
]  # fmt: skip


def names(table: FieldTable) -> set[str]:
    return {*table.honoured, *table.only, *table.refused}


@pytest.mark.parametrize(("params", "table"), CLIENTS, ids=["chat", "text", "responses", "messages"])
def test_every_parameter_of_the_official_clients_is_in_a_table(params: type, table: FieldTable):
    assert {*params.__annotations__} - names(table) == set()
    assert len(names(table)) == len(table.honoured) + len(table.only) + len(table.refused), (
        "in one part of it"
    )


@pytest.mark.server
def test_every_field_of_sglang_is_in_a_table():
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from sglang.srt.entrypoints.openai import protocol

    tables = {
        protocol.ChatCompletionRequest: OPENAI_FIELDS, protocol.CompletionRequest: OPENAI_FIELDS,
        protocol.ResponsesRequest: RESPONSES_FIELDS, AnthropicMessagesRequest: MESSAGES_FIELDS,
    }  # fmt: skip
    for model, table in tables.items():
        assert {*model.model_fields} - names(table) == set(), model.__name__


def test_the_page_has_every_field_of_openai():
    page = (ROOT / "docs/server.md").read_text(encoding="utf-8")
    section = page.partition("## Fields of OpenAI's API")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`(\w+)[.`]", section))
    parameters = {*ChatParams.__annotations__, *TextParams.__annotations__}
    assert parameters - listed == set()
    assert {*OPENAI_FIELDS.honoured, *OPENAI_FIELDS.only} - listed - {"apr", "reasoning"} == set()
    for effort in EFFORTS:
        assert f"`{effort}`" in section


def test_a_field_is_refused_by_its_name():
    table = FieldTable(
        ("model", "temperature"), {"store": ((False,), "nothing is stored")}, {"echo": "one reply"}
    )
    table.check({"model": "m", "temperature": 1, "store": False, "echo": False, "x": None})
    for body, message in (
        ({"store": True}, "store=True cannot be combined with apr, expected False: nothing is stored"),
        ({"echo": True}, "echo cannot be combined with apr: one reply"),
        ({"temprature": 1}, "'temprature' is no field of a request with apr, did you mean 'temperature'?"),
        ({"x" * 10**6: 1}, "is no field of a request with apr"),
    ):
        with pytest.raises(apr.AprError) as error:
            table.check(body)
        assert message in str(error.value)
        assert len(str(error.value)) < 200
        assert table.refuses(body, {})
    table.check({"echo": 5}, {"echo": 5})


def test_efforts_are_bounded_by_the_operator():
    limits = RequestLimits(tokens=1000, width=3)
    assert effort_options("high", limits) == {"budget": {"tokens": 1000}}
    assert effort_options("low", limits) == {"budget": {"tokens": 1000, "width": 2, "blocks": 1}}
    assert effort_options(None, limits) == effort_options("medium", limits) == {}
    for wrong in ("ultra", 0.5, ["low"]):
        with pytest.raises(apr.AprError, match="reasoning_effort="):
            effort_options(wrong, limits)


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b'{"apr": {}}', True), (b'{"x": 1, "\\u0061p\\u0072" : true}', True), (b'{"apr": null}', False),
     (b'{"apr": false}', False), (b'{"x": {"apr": 1}}', False), (b'{"apr"', False), (b'["apr"]', False), (b"", False)],
)  # fmt: skip
def test_a_body_asks_for_a_trajectory(body: bytes, expected: bool):
    assert has_apr({"body": body}) is expected


def test_routes_that_take_apr():
    assert all(map(takes_apr, ("/v1/chat/completions", "/v1/messages", "/apr/generate", "/apr/fork")))
    assert not any(map(takes_apr, ("/generate", "/v1/embeddings", "/v1/messages/count_tokens", "/apr")))


@pytest.mark.parametrize("text", ["plain 12", "\u00fc \U0001f600 \u4e2d", "<Parallel>\n\t\0"])
def test_the_bytes_of_tokens_are_those_of_the_text(text: str):
    tokenizer = HfTokenizer(builtin_path())
    pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode(text)]
    assert b"".join(piece or b"?" for piece in pieces) == text.encode()
    assert tokenizer.token_bytes(10**9) is None
