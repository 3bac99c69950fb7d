"""Where nobody listens, a server sends few large chunks; where a request may be cut, it sends every token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.engine.sglang_request import STREAM_INTERVAL
from tests.support.fake_sglang_server import REPLIES, TOKENIZER, SglangServer, phase_of

BRANCHES = {"branch 1", "branch 2"}
OTHERS = {"trunk", "after"}


def reason(fake: SglangServer, timeout: float = 60.0, **options: Any) -> apr.Trajectory:
    async def once() -> apr.Trajectory:
        async with (
            fake.running() as url,
            await apr.HttpEngine.connect(url, tokenizer=TOKENIZER, timeout=timeout) as engine,
        ):
            return await apr.areason(engine, "Q: ", **options)

    return asyncio.run(once())


def server(**options: Any) -> SglangServer:
    return SglangServer(**{"info": {"stream_interval": 1}, **options})


def decoding(fake: SglangServer) -> dict[str, list[int | None]]:
    """The intervals of the requests that decode. Commits have no output to stream."""
    intervals = dict(fake.intervals)
    assert set(intervals.pop("commit", [None])) == {None}
    return intervals


@pytest.mark.parametrize("incremental", [False, True], ids=["cumulative", "incremental"])
def test_few_chunks_give_the_same_trajectory(incremental: bool):
    quiet, listened = server(incremental=incremental), server(incremental=incremental)
    events: list[apr.Event] = []
    one, other = reason(quiet), reason(listened, on_event=events.append)
    assert (one.text, one.token_ids) == (other.text, other.token_ids)
    assert decoding(quiet) == {phase: [STREAM_INTERVAL] for phase in OTHERS | BRANCHES}
    assert decoding(listened) == {phase: [None] for phase in OTHERS | BRANCHES}
    assert max(quiet.chunks.values()) <= 5
    assert min(listened.chunks.values()) > 5


@pytest.mark.parametrize(
    ("options", "streamed"),
    [
        ({"budget": {"seconds": 30.0}}, OTHERS | BRANCHES),
        ({"policy": "deadline:30"}, BRANCHES),
        ({"policy": "first"}, BRANCHES),
        ({"policy": "quorum:1"}, BRANCHES),
        ({"policy": lambda ended: False}, BRANCHES),
        ({"policy": "all"}, set()),
    ],
    ids=["seconds", "deadline", "first", "quorum", "function", "all"],
)
def test_what_may_be_cut_is_sent_token_by_token(options: dict, streamed: set[str]):
    fake = server()
    reason(fake, **options)
    sent = decoding(fake)
    assert {phase for phase, values in sent.items() if values == [None]} == streamed & set(sent)
    # The first branch may end before the other is sent, which then never is.
    ends_early = options.get("policy") in ("first", "quorum:1")
    assert set(sent) >= OTHERS | (set() if ends_early else BRANCHES)
    assert set(sent) & BRANCHES


@pytest.mark.parametrize(
    "options", [{"policy": "deadline:0.15"}, {"policy": "first"}], ids=["deadline", "first"]
)
def test_what_was_decoded_before_a_cut_is_kept(options: dict):
    def script(request: apr.Request, prompt: str) -> apr.Reply:
        phase = phase_of(prompt)
        return apr.Reply(REPLIES[phase], delay={"branch 1": 0.01, "branch 2": 0.02}.get(phase, 0.0))

    trajectory = asyncio.run(apr.areason(apr.ScriptedEngine(script, TOKENIZER), "Q: ", **options))
    (cut,) = [s for s in trajectory.spans if s.path == (1, 2) and s.origin == "decoded"]
    assert 1 <= cut.tokens < len(TOKENIZER.encode(REPLIES["branch 2"]))
    assert trajectory.blocks[0].branches[1].outcome in ("timeout", "aborted")


@pytest.mark.parametrize(
    ("info", "timeout", "interval"),
    [
        ({}, 60, None),
        ({"stream_interval": "fast"}, 60, None),
        ({"stream_interval": True}, 60, None),
        ({"stream_interval": 64}, 60, None),
        ({"stream_interval": 8}, 60, STREAM_INTERVAL),
        ({"stream_interval": 1}, 8, 8),  # unknown steps count 0.25 s, and a chunk has a quarter of the time
        ({"stream_interval": 1}, 0.5, None),
    ],
)
def test_what_a_server_supports_and_a_timeout_leaves(info: dict, timeout: float, interval: int | None):
    fake = SglangServer(info=info)

    async def once() -> None:
        async with (
            fake.running() as url,
            await apr.HttpEngine.connect(url, tokenizer=TOKENIZER, timeout=timeout) as engine,
        ):
            await engine.decode(apr.Request("apr-1", (1, 2), 64))

    asyncio.run(once())
    assert fake.intervals == {"trunk": [interval]}


def test_a_server_that_refuses_the_parameter_is_asked_without_it():
    fake = server()

    async def once() -> list[apr.Result]:
        async with (
            fake.running() as url,
            await apr.HttpEngine.connect(url, tokenizer=TOKENIZER) as engine,
        ):
            del fake.info["stream_interval"]  # from now on it refuses it
            return [await engine.decode(apr.Request(f"apr-{i}0", (1, 2), 64)) for i in range(2)]

    first, second = asyncio.run(once())
    assert first.token_ids == second.token_ids
    assert fake.intervals == {"trunk": [STREAM_INTERVAL, None, None]}


def test_an_interval_of_the_caller_is_kept():
    fake = server()

    async def once() -> None:
        async with (
            fake.running() as url,
            await apr.HttpEngine.connect(url, tokenizer=TOKENIZER) as engine,
        ):
            await engine.decode(apr.Request("apr-1", (1, 2), 64, {"stream_interval": 4}))

    asyncio.run(once())
    assert fake.intervals == {"trunk": [4]}


def test_steps_that_take_long_make_chunks_smaller():
    fake = server()

    async def once() -> None:
        async with (
            fake.running() as url,
            await apr.HttpEngine.connect(url, tokenizer=TOKENIZER) as engine,
        ):
            with engine._step_timer.running():
                engine._step_timer.record_step(1, 3.0)
            await engine.decode(apr.Request("apr-1", (1, 2), 64))

    asyncio.run(once())
    assert fake.intervals == {"trunk": [10]}, "a quarter of 120 s"


@pytest.mark.server
def test_a_server_decodes_the_same_with_and_without_a_listener(server, monkeypatch: pytest.MonkeyPatch):
    chunks = {"quiet": 0, "listened": 0}
    options: dict[str, Any] = {
        "mode": "parallel",
        "temperature": 0,
        "budget": apr.Budget(tokens=160, width=3),
    }

    async def once(arm: str, **listener: Any) -> apr.Trajectory:
        async with await apr.HttpEngine.connect(server.url) as engine:
            stream = engine.events

            async def events(body: Any) -> Any:
                async for data in stream(body):
                    chunks[arm] += 1
                    yield data

            monkeypatch.setattr(engine, "events", events)
            return await apr.areason(engine, "Q: ", "threadweaver", **options, **listener)

    quiet = asyncio.run(once("quiet"))
    listened = asyncio.run(once("listened", on_event=lambda event: None))
    assert (quiet.text, quiet.token_ids) == (listened.text, listened.token_ids)
    assert chunks["quiet"] <= 3 * len(quiet.calls)
    assert chunks["listened"] > 2 * chunks["quiet"]
