"""The sequential engine: one request at a time, also over its forks, and otherwise the engine that it wraps."""

from __future__ import annotations

import asyncio

import sgl_apr as apr
from sgl_apr.engine import Load, SequentialEngine

REQUESTS = [apr.Request(f"apr-x-{k}", (97, k), 10) for k in range(4)]


def test_requests_decode_one_at_a_time():
    engine = apr.ScriptedEngine(lambda request, text: apr.Reply("abc", delay=0.001))
    running: list[int] = []

    async def program() -> None:
        sequential = SequentialEngine(engine)
        _, forks = await sequential.fork(REQUESTS[0], 3)
        engines = [sequential, *forks]
        count = [lambda ids: running.append(len(engine.active))] * 4
        await asyncio.gather(*(e.decode(r, c) for e, r, c in zip(engines, REQUESTS, count, strict=True)))

    asyncio.run(program())
    assert len(engine.requests) == 4
    assert set(running) == {1}


def test_everything_else_is_the_engines():
    engine = apr.ScriptedEngine(lambda request, text: "", supports_seeds=False)
    engine.context, engine.joins_kv, engine.loads = 512, True, Load(1, 2, 3, 4)

    async def program() -> Load:
        sequential = SequentialEngine(engine)
        assert sequential.tokenizer is engine.tokenizer
        assert (sequential.grammar_backend, sequential.supports_seeds) == ("llguidance", False)
        assert (sequential.context, sequential.joins_kv) == (512, True)
        await sequential.commit(REQUESTS[0])
        await sequential.release()
        await sequential.abort("apr-x")
        return await sequential.load()

    assert asyncio.run(program()) == engine.loads
    assert (engine.commits, engine.released, engine.aborted) == ([REQUESTS[0].input_ids], 1, ["apr-x"])
