"""Chat messages as prompts on a real server, which renders them by the template of its model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import sgl_apr as apr

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

CHAT = [{"role": "user", "content": "Why?"}]
RENDERED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
SMALL = {"tokens": 30}


def test_messages_are_rendered_as_for_a_chat_completion(server, tmp_path: Path):
    url = server.url.removeprefix("http://")
    trajectory = apr.run(url, CHAT, budget=SMALL)
    assert trajectory.spans[0].text == RENDERED
    parts = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    assert apr.run(url, parts, budget=SMALL).spans[0].token_ids == trajectory.spans[0].token_ids
    outcomes = apr.run_many(url, {"p": CHAT}, tmp_path / "out.jsonl", budget=SMALL)
    assert outcomes.finished == ("p",)
    again = apr.run_many(url, {"p": CHAT}, tmp_path / "out.jsonl", budget=SMALL)
    assert again.skipped == ("p",)


def test_messages_that_the_server_refuses(server):
    for wrong in ([{"role": "nobody", "content": "x"}], [{"role": "user"}]):
        with pytest.raises(apr.AprError, match="the chat messages cannot be rendered") as raised:
            apr.run(server.url, wrong, budget=SMALL)
        assert not isinstance(raised.value, apr.EngineError)


def test_ids_outside_of_the_vocabulary_never_reach_a_server(server):
    async def ask(ids: list[int]) -> apr.Trajectory:
        async with await apr.HttpEngine.connect(server.url) as engine:
            return await apr.areason(engine, ids, budget=SMALL)

    with pytest.raises(apr.AprError, match="the token id 1000000000, which is outside of the vocabulary"):
        asyncio.run(ask([10**9]))
    assert asyncio.run(ask([5])).spans[0].token_ids == (5,), "the server still runs"
