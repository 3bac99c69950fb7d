"""The HTTP engine with servers that fail: typed errors within seconds, and no request left running."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

import sgl_apr as apr
from sgl_apr.engine.base import Load
from sgl_apr.engine.http_session import KEEPALIVE_S
from sgl_apr.runtime import reasoning_run
from tests.support.fake_sglang_server import TOKENIZER, SglangServer


def reason(fake: SglangServer, *, timeout: float = 30.0, **options) -> apr.Trajectory:
    """One trajectory against the fake server, over a connection that is closed afterwards."""

    async def once() -> apr.Trajectory:
        async with (
            fake.running() as url,
            await apr.HttpEngine.connect(url, tokenizer=TOKENIZER, timeout=timeout) as engine,
        ):
            return await apr.areason(engine, "Q: ", **options)

    return asyncio.run(once())


def connect(url: str, **options) -> None:
    async def once() -> None:
        async with await apr.HttpEngine.connect(url, **options):
            pass

    asyncio.run(once())


@pytest.mark.parametrize("incremental", [False, True], ids=["cumulative", "incremental"])
def test_both_ways_of_streaming_give_the_same_ids(incremental):
    deltas: list[str] = []
    trajectory = reason(
        SglangServer(incremental=incremental),
        on_event=lambda e: deltas.append(e.text) if isinstance(e, apr.Delta) else None,
    )
    apr.dialect("threadweaver").validate(trajectory.text)
    assert [b.outline for b in trajectory.blocks[0].branches] == ["left", "right"]
    assert trajectory.answer.strip() == "Done."
    assert len(deltas) > 40
    assert sorted("".join(deltas)) == sorted(trajectory.text)


# Connecting


def test_nobody_there():
    url = f"http://127.0.0.1:{unused_port()}"
    with pytest.raises(apr.EngineError, match=f"no server at {url}"):
        connect(url)


@pytest.mark.parametrize(
    ("status", "text", "kind", "message"),
    [
        (200, "<html>hello</html>", "text/html", "does not answer like an SGLang server|broke off"),
        (200, "{}", "application/json", "llguidance"),
        (404, "", "text/plain", "answered 404"),
    ],
)
def test_something_else_there(status, text, kind, message):
    async def once() -> None:
        async def answer(request: web.Request) -> web.Response:
            return web.Response(status=status, text=text, content_type=kind)

        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        async with TestServer(app) as server:
            with pytest.raises((apr.EngineError, apr.UnsupportedEngine), match=message):
                await apr.HttpEngine.connect(str(server.make_url("")))

    asyncio.run(once())


def test_another_grammar_backend_is_refused():
    with pytest.raises(
        apr.UnsupportedEngine, match="runs --grammar-backend outlines, expected llguidance or xgrammar"
    ):
        reason(SglangServer(info={"grammar_backend": "outlines"}))


def test_a_tokenizer_that_is_not_readable_here_is_refused():
    async def once() -> None:
        async with SglangServer().running() as url:
            await apr.HttpEngine.connect(url)

    with pytest.raises(apr.UnsupportedEngine, match=r"/nowhere/at\.all"):
        asyncio.run(once())


def test_the_api_key_is_sent():
    async def once() -> list[str | None]:
        fake = SglangServer()
        async with (
            fake.running() as url,
            await apr.HttpEngine.connect(url, tokenizer=TOKENIZER, api_key="secret"),
        ):
            return fake.headers

    assert asyncio.run(once()) == ["Bearer secret"]


def test_an_idle_connection_is_used_again_only_long_before_the_server_closes_it():
    async def once() -> list[int]:
        fake = SglangServer()
        async with fake.running() as url, await apr.HttpEngine.connect(url, tokenizer=TOKENIZER) as engine:
            for pause in (0.0, 0.0, KEEPALIVE_S + 0.3):
                await asyncio.sleep(pause)
                await engine.commit(apr.Request(f"apr-{pause}", (1, 2, 3)))
        return fake.connections

    first, soon, late = asyncio.run(once())
    assert first == soon
    assert late != first


# Failing under way

FAILURES = {
    "status 500": "the server answered 500: out of memory",
    "dies": "broke off the answer",
    "ends early": "without a finish reason",
    "aborts": "aborted the request: scheduler restarts",
    "reports an error": "KV cache is full",
    "sends no JSON": "does not answer like an SGLang server",
    "sends another protocol": "does not answer like an SGLang server",
}


AT_ONCE = apr.Retry(wait=0)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_branch_that_fails_is_skipped(failure):
    trajectory = reason(SglangServer(branch_1=failure), retry=AT_ONCE)
    apr.dialect("threadweaver").validate(trajectory.text)
    failed, complete = trajectory.blocks[0].branches
    assert (failed.outcome, failed.text) == ("failed", " (failed)")
    assert (complete.outcome, complete.text) == ("ok", " two is longer\n")
    assert trajectory.answer.strip() == "Done."


@pytest.mark.parametrize("failure", FAILURES)
def test_a_branch_that_fails_ends_the_other(failure):
    fake = SglangServer(branch_1=failure, branch_2="is slow")
    began = time.monotonic()
    with pytest.raises(apr.BranchFailed, match=FAILURES[failure]) as raised:
        reason(fake, on_branch_failure="raise", retry=AT_ONCE)
    assert raised.value.path == (1, 1)
    assert time.monotonic() - began < 5
    # The other branch may have failed before this one was sent.
    assert fake.rids.get("branch 2") in {None, *fake.aborted}
    assert not fake.live


@pytest.mark.parametrize("phase", ["trunk", "commit", "after"])
@pytest.mark.parametrize("failure", ["status 500", "dies"])
def test_every_phase_can_fail(phase, failure, monkeypatch):
    monkeypatch.setattr(reasoning_run, "MAX_RECOMPUTED_TOKENS", 0)  # so that the fork commits
    with pytest.raises(apr.EngineError, match=FAILURES[failure]):
        reason(SglangServer(**{phase: failure}), retry=AT_ONCE)


def test_silence_is_a_timeout():
    fake = SglangServer(branch_1="stops sending")
    with pytest.raises(apr.BranchFailed, match=r"did not answer within 0\.5 s") as raised:
        reason(fake, timeout=0.5, on_branch_failure="raise")
    assert isinstance(raised.value.__cause__, apr.EngineTimeout)
    assert fake.rids["branch 1"] in fake.aborted


def test_a_deadline_aborts_what_runs():
    fake = SglangServer(branch_1="is slow", branch_2="is slow")
    trajectory = reason(fake, budget=apr.Budget(seconds=2.0))
    apr.dialect("threadweaver").validate(trajectory.text)
    assert [b.outcome for b in trajectory.blocks[0].branches] == ["timeout", "timeout"]
    assert trajectory.answer.strip() == "Done."
    assert fake.aborted >= {fake.rids["branch 1"], fake.rids["branch 2"]}
    assert not fake.live


def test_cancelling_aborts_what_runs():
    async def once() -> SglangServer:
        fake = SglangServer(branch_1="is slow", branch_2="is slow")
        async with (
            fake.running() as url,
            await apr.HttpEngine.connect(url, tokenizer=TOKENIZER) as engine,
        ):
            task = asyncio.create_task(apr.areason(engine, "Q: "))
            while len(fake.live) < 2:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert fake.aborted == {fake.rids["branch 1"], fake.rids["branch 2"]}
            # The connection is still good.
            fake.failures.clear()
            await apr.areason(engine, "Q: ")
        return fake

    asyncio.run(once())


# The real server


@pytest.mark.server
def test_run_blocks_until_the_answer_is_there(server):
    trajectory = apr.run(server.url, "Q: ", mode="parallel", budget=apr.Budget(tokens=200), temperature=1.0)
    apr.dialect("threadweaver").validate(trajectory.text)
    assert trajectory.blocks


@pytest.mark.server
def test_a_sampling_parameter_that_the_server_does_not_know(server):
    async def once() -> None:
        async with await apr.HttpEngine.connect(server.url) as engine:
            await engine.decode(apr.Request("apr-warm", (1, 2, 3), 4, {"warmth": 1}))

    with pytest.raises(apr.AprError, match="no option 'warmth'"):
        apr.run(server.url, "Q: ", warmth=1)
    with pytest.raises(apr.EngineError, match="warmth") as raised:
        asyncio.run(once())
    assert raised.value.status == 400


@pytest.mark.server
def test_the_load_of_a_server(server):
    async def once() -> Load:
        async with await apr.HttpEngine.connect(server.url) as engine:
            return await engine.load()

    load = asyncio.run(once())
    assert (load.running, load.waiting) == (0, 0)
    assert load.max_tokens > 1000
