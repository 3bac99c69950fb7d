"""Requests that continue under their grammar where another one was cut, on real servers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.engine.base import Request
from sgl_apr.engine.sglang_request import RESUME_PARAM
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models.tiny import random_llama

DIALECTS = ("threadweaver", "multiverse", "apr", "spawn", "npr")
CUTS = (1, 2, 5, 11, 23, 40)
LENGTH = 48


def trunk(engine: apr.HttpEngine, name: str, **options) -> Request:
    grammar = apr.dialect(name).lower("trunk", engine.tokenizer, engine.grammar_backend, fork="required")
    ids = tuple(engine.tokenizer.encode("Q: how many?"))
    return Request(f"resume-{name}", ids, LENGTH, grammar=grammar, sampling={"temperature": 0.0}, **options)


async def resumed(engine: apr.HttpEngine, request: Request, whole: tuple[int, ...], cut: int) -> apr.Result:
    """What follows the first `cut` ids of a reply."""
    ids = (*request.input_ids, *whole[:cut])
    again = Request(
        f"{request.rid}-{cut}", ids, LENGTH - cut, grammar=request.grammar, sampling=request.sampling,
        resumed_tokens=cut,
    )  # fmt: skip
    return await engine.decode(again)


async def check(url: str, name: str) -> bool:
    """Check that replies continue. Returns whether there was a tag to continue after."""
    async with await apr.HttpEngine.connect(url) as engine:
        assert engine.resumes_grammar
        request = trunk(engine, name)
        whole = (await engine.decode(request)).token_ids
        tags: set[int | None] = {engine.tokenizer.special_token_id(tag) for tag in apr.dialect(name).tags}
        cuts = [cut for cut in CUTS if cut < len(whole)]
        assert len(cuts) >= 3
        for cut in cuts:
            rest = (await resumed(engine, request, whole, cut)).token_ids
            assert whole[:cut] + rest == whole, cut
    return bool(tags & set(whole))


@pytest.mark.server
@pytest.mark.parametrize("name", DIALECTS)
def test_a_cut_reply_continues_as_if_it_had_not_been_cut(server: Server, name: str):
    assert asyncio.run(check(server.url, name)), "there is a tag"


@pytest.mark.slow
@pytest.mark.server
def test_a_cut_reply_continues_under_xgrammar(tmp_path: Path):
    tags = tuple(dict.fromkeys(t for n in apr.dialect_names() for t in apr.dialect(n).tags))
    model = random_llama(tmp_path / "model", tags=tags, tag_bias=5.0)
    with Server(model, grammar_backend="xgrammar") as server:
        assert any([asyncio.run(check(server.url, name)) for name in DIALECTS]), "there is a tag"


@pytest.mark.server
@pytest.mark.parametrize(
    ("count", "message"),
    [
        (10_000, "apr_resumed_tokens=10000, expected a number from 1 to"),
        (0, "apr_resumed_tokens=0, expected a number from 1 to"),
        (True, "apr_resumed_tokens=True, expected a number from 1 to"),
        ("5", "apr_resumed_tokens='5', expected a number from 1 to"),
        (3, "the grammar cannot resume after the last 3 tokens"),
    ],
)
def test_ids_that_the_grammar_refuses_end_the_request_alone(server: Server, count: object, message: str):
    async def run() -> None:
        async with await apr.HttpEngine.connect(server.url) as engine:
            request = trunk(engine, "threadweaver")
            tag = engine.tokenizer.special_token_id(apr.dialect("threadweaver").tags[-1])
            assert tag is not None
            wrong = Request(
                "wrong", (*request.input_ids, tag, tag, tag), 8, grammar=request.grammar,
                sampling={"temperature": 0.0, "custom_params": {RESUME_PARAM: count}},
            )  # fmt: skip
            with pytest.raises(apr.EngineError, match=message):
                await engine.decode(wrong)
            assert len((await engine.decode(request)).token_ids) == LENGTH, "the server is alive"

    asyncio.run(run())
