"""Requests of programs after a KV join: what the cache has lost is committed again, or read as text."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.runtime.frontend.joined_requests import body_with_layout, continues_joins, send_joined
from sgl_apr.runtime.frontend.token_ledger import ProgramTokens
from sgl_apr.trajectory.join_layout import Layout

JOINED: Layout = (3, ((2,), (4,)))
TOKENS = ProgramTokens("x" * 12, tuple(range(12)), JOINED)
FULL = (*JOINED, 3)


class Server:
    """Answers 409 to a layout until so many requests were sent."""

    def __init__(self, misses: int, status: int = 409) -> None:
        self.misses, self.status = misses, status
        self.sent: list[Layout | None] = []
        self.commits: list[apr.Request] = []

    async def commit(self, request: apr.Request) -> apr.Result:
        self.commits.append(request)
        return apr.Result((), "length", len(request.input_ids), 0)

    async def send(self, layout: Layout | None) -> str:
        self.sent.append(layout)
        if layout is not None and len(self.sent) <= self.misses:
            raise apr.EngineError("KV join: lost", self.status)
        return "answer"


def send(server: Server, tokens: ProgramTokens = TOKENS) -> str:
    return asyncio.run(send_joined(server, tokens, "key", server.send))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("misses", "sent", "commits"), [(0, [FULL], 0), (1, [FULL, FULL], 2), (9, [FULL, FULL, None], 2)]
)
def test_lost_parts_are_committed_again_once(misses: int, sent: list[Any], commits: int):
    server = Server(misses)
    assert send(server) == "answer"
    assert server.sent == sent
    assert [r.input_ids for r in server.commits] == [(0, 1, 2, 3, 4), (0, 1, 2, 5, 6, 7, 8)][:commits]
    assert all(r.fields == {"routing_key": "key"} for r in server.commits)
    assert len({r.rid for r in server.commits}) == commits


def test_another_failure_is_raised():
    server = Server(1, status=500)
    with pytest.raises(apr.EngineError, match="lost"):
        send(server)
    assert not server.commits


@pytest.mark.parametrize(
    "tokens", [ProgramTokens("ab", (1, 2)), ProgramTokens("x" * 9, tuple(range(9)), JOINED)]
)
def test_text_that_joins_nothing_or_ends_with_a_join_has_no_layout(tokens: ProgramTokens):
    server = Server(0)
    send(server, tokens)
    assert server.sent == [None]


def test_tokens_keep_the_layout_while_they_grow():
    tokenizer = apr.ByteTokenizer()
    grown = TOKENS.extended_to("x" * 12 + "yz", tokenizer)
    assert grown.joined_layout == (*JOINED, 5)
    assert grown.with_decoded("ab", [97, 98, tokenizer.EOS], tokenizer).joined_layout == (*JOINED, 7)
    assert grown.extended_to("another text", tokenizer).layout == ()


def test_the_body_of_a_request_with_a_layout():
    body = {
        "rid": "a",
        "input_ids": [1],
        "sampling_params": {"max_new_tokens": 4, "custom_params": {"own": 1}},
    }
    joined = body_with_layout(body, FULL)
    assert joined["rid"] != "a"
    assert joined["sampling_params"]["custom_params"] == {"own": 1, "apr_layout": "[3, [[2], [4]], 3]"}
    assert body_with_layout(body, None) == body
    assert continues_joins(body)
    assert not continues_joins({**body, "return_logprob": True})
    assert not continues_joins({"input_ids": [1]}), "several samples, whose ids SGLang makes"
