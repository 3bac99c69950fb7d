"""How long a step takes by how many requests run, and how busy a server says it is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import sgl_apr as apr
from sgl_apr.engine import http
from sgl_apr.engine.base import Load
from sgl_apr.engine.step_timer import AVERAGING_WINDOW, BUCKET_COUNT, StepTimer
from tests.support.fake_sglang_server import TOKENIZER, SglangServer


def measured(*pairs: tuple[float, float]) -> Load:
    return Load(running=0, waiting=0, used_tokens=0, max_tokens=0, steps=pairs)


def at(timer: StepTimer, running: int, *chunks: tuple[int, float]) -> None:
    """Record chunks (tokens, seconds) while `running` requests run."""
    with ExitStack() as stack:
        for _ in range(running):
            stack.enter_context(timer.running())
        for tokens, seconds in chunks:
            timer.record_step(tokens, seconds)


# Measuring


def test_no_steps_before_the_first_chunk():
    timer = StepTimer()
    at(timer, 3)
    assert timer.steps == ()


def test_buckets_are_powers_of_two_with_the_mean_of_what_was_in_them():
    timer = StepTimer()
    for running in (1, 2, 3, 4, 7, 8, 1023, 1024, 3000):
        at(timer, running, (1, running / 1000))
    expected = [(1, 0.001), (2.5, 0.0025), (5.5, 0.0055), (8, 0.008), (1023, 1.023), (2012, 2.012)]
    assert [pair for pair in timer.steps] == [pytest.approx(pair) for pair in expected]


def test_a_chunk_of_several_tokens_is_several_steps():
    timer = StepTimer()
    at(timer, 1, (4, 1.0))
    assert timer.steps == ((1.0, 0.25),)


def test_a_request_that_failed_runs_no_longer():
    timer = StepTimer()
    with pytest.raises(ValueError, match="failed"), timer.running():
        raise ValueError("failed")
    at(timer, 1, (1, 0.5))
    assert timer.steps == ((1.0, 0.5),)


def test_a_plain_mean_at_first():
    timer = StepTimer()
    seconds = [random.Random(0).random() for _ in range(AVERAGING_WINDOW)]
    at(timer, 1, *((1, s) for s in seconds))
    assert timer.steps[0][1] == pytest.approx(sum(seconds) / AVERAGING_WINDOW)


@pytest.mark.parametrize("running", [1, 64])
def test_then_what_is_older_counts_less(running):
    """After `AVERAGING_WINDOW` more steps, each received by every request, 1/e of the old mean is left."""
    timer = StepTimer()
    at(timer, running, *[(1, 1.0)] * (AVERAGING_WINDOW * running * 10))
    at(timer, running, *[(1, 0.0)] * (AVERAGING_WINDOW * running))
    assert timer.steps[0][1] == pytest.approx(0.36, abs=0.01)


def test_one_slow_step_of_many_requests_does_not_become_the_mean():
    timer = StepTimer()
    at(timer, 512, *[(1, 0.01)] * (512 * AVERAGING_WINDOW), *[(1, 1.0)] * 512)
    assert timer.steps[0][1] < 0.05


def test_pairs_ascend_whatever_was_heard():
    timer, rng = StepTimer(), random.Random(1)
    for _ in range(300):
        at(timer, int(2 ** rng.uniform(0, 11)), (rng.randint(1, 5), rng.random()))
    centres = [running for running, _ in timer.steps]
    assert len(centres) == BUCKET_COUNT
    assert centres == sorted(set(centres))


# What is made of it


def test_between_and_beyond_what_was_measured():
    load = measured((2.0, 0.010), (6.0, 0.030), (14.0, 0.050))
    expected = {1: 0.005, 2: 0.010, 4: 0.020, 6: 0.030, 10: 0.040, 14: 0.050, 22: 0.070}
    assert {n: load.step_s(n) for n in expected} == pytest.approx(expected)


def test_below_the_first_the_line_goes_on_but_no_faster_than_the_requests():
    busy = measured((32.0, 0.020), (96.0, 0.036))  # a client that has only seen a busy server
    assert busy.step_s(32) == pytest.approx(0.020)
    assert busy.step_s(1) == pytest.approx(0.020 - 31 * 0.016 / 64)
    assert measured((10.0, 0.010), (12.0, 0.100)).step_s(1) == pytest.approx(0.001), "in proportion at most"
    assert measured((10.0, 0.020), (20.0, 0.010)).step_s(1) == pytest.approx(0.020), "never more"


def test_beyond_the_last_steps_take_no_less_time():
    load = measured((2.0, 0.010), (6.0, 0.030), (14.0, 0.020))
    assert load.step_s(10) == pytest.approx(0.025)
    assert load.step_s(100) == pytest.approx(0.020)


def test_two_that_are_close_together_do_not_make_a_steep_line():
    assert measured((15.9, 0.010), (16.1, 0.020)).step_s(161) == pytest.approx(0.2)


def test_one_measurement_says_nothing_of_twice_as_many():
    load = measured((5.0, 0.010))
    assert [load.step_s(n) for n in (1, 5, 10, 11)] == [0.010, 0.010, 0.010, None]
    assert measured().step_s(1) is None


def test_free_tokens():
    assert Load(running=1, waiting=9, used_tokens=30, max_tokens=100).free_tokens == 70
    assert Load(running=1, waiting=9, used_tokens=101, max_tokens=100).free_tokens == 0


# The engine


class Busy(SglangServer):
    """Two ranks that say how busy they are, as soon as `answer` is set."""

    def __init__(self, slots: tuple[int, int] = (48, 48), **options) -> None:
        super().__init__(**options)
        self.slots, self.load_requests, self.status = slots, 0, 200
        self.answer = asyncio.Event()
        self.answer.set()

    async def _loads(self, request: web.Request) -> web.Response:
        self.load_requests += 1
        await self.answer.wait()
        ranks = [
            {
                "num_running_reqs": 3,
                "num_waiting_reqs": 2,
                "num_used_tokens": 100,
                "max_total_num_tokens": 1000,
                "max_running_requests": slots,
            }
            for slots in self.slots
        ]
        return web.json_response({"loads": ranks}, status=self.status)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[apr.HttpEngine]:
        app = web.Application()
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        async with (
            TestServer(app) as server,
            await apr.HttpEngine.connect(str(server.make_url("")), tokenizer=TOKENIZER) as engine,
        ):
            yield engine


@pytest.mark.parametrize(("slots", "sum_of_them"), [((48, 64), 112), ((0, 0), None)])
def test_the_load_is_that_of_all_ranks(slots, sum_of_them):
    async def once() -> None:
        async with Busy(slots).connected() as engine:
            assert await engine.load() == Load(6, 4, 200, 2000, sum_of_them, ())

    asyncio.run(once())


def test_the_load_holds_what_decoding_measured():
    async def once() -> None:
        async with Busy(branch_2="is slow").connected() as engine:
            prompts = [tuple(TOKENIZER.encode(text)) for text in ("Q: ", "1:")]
            slow = asyncio.ensure_future(engine.decode(apr.Request("slow", (*TOKENIZER.encode("2:"),), 400)))
            await asyncio.gather(
                *(engine.decode(apr.Request(f"r{i}", p, 400)) for i, p in enumerate(prompts))
            )
            await engine.commit(apr.Request("commit", prompts[0]))
            slow.cancel()
            load = await engine.load()
            assert 1 < load.steps[-1][0] <= 3
            # The chunks of the slow one are a second apart, and it received only two.
            assert all(0 < seconds < 1 for _, seconds in load.steps)

    asyncio.run(once())


def test_the_first_tokens_measure_nothing():
    async def once() -> None:
        async with Busy(trunk="is slow").connected() as engine:
            await engine.commit(apr.Request("commit", tuple(TOKENIZER.encode("Q: "))))
            received = asyncio.Event()
            request = apr.Request("r", tuple(TOKENIZER.encode("Q: ")), 400)
            task = asyncio.ensure_future(engine.decode(request, lambda ids: received.set()))
            await received.wait()
            task.cancel()
            assert (await engine.load()).steps == ()

    asyncio.run(once())


def test_all_who_ask_at_once_share_a_request():
    async def once() -> None:
        fake = Busy()
        async with fake.connected() as engine:
            fake.answer.clear()
            calls = [asyncio.ensure_future(engine.load()) for _ in range(50)]
            while not fake.load_requests:
                await asyncio.sleep(0.01)
            calls[0].cancel()  # the call that sent the request
            await asyncio.wait(calls[:1])
            fake.answer.set()
            assert len(set(await asyncio.gather(*calls[1:]))) == 1
            assert fake.load_requests == 1

    asyncio.run(once())


def test_an_answer_is_good_for_a_while(monkeypatch):
    async def once() -> None:
        fake = Busy()
        async with fake.connected() as engine:
            monkeypatch.setattr(http, "LOAD_TTL_S", 60.0)
            assert await engine.load() is await engine.load()
            assert fake.load_requests == 1
            engine._load_expires_at = 0.0
            monkeypatch.setattr(http, "LOAD_TTL_S", 0.0)
            await engine.load()
            await engine.load()
            assert fake.load_requests == 3

    asyncio.run(once())


def test_a_failure_is_not_kept():
    async def once() -> None:
        fake = Busy()
        async with fake.connected() as engine:
            fake.status = 503
            with pytest.raises(apr.EngineError, match="503") as raised:
                await engine.load()
            assert raised.value.status == 503
            fake.status = 200
            assert (await engine.load()).running == 6

    asyncio.run(once())


@pytest.mark.parametrize("seeded", [False, True])
def test_whether_the_server_honours_seeds(seeded):
    async def once() -> bool:
        async with Busy(info={"enable_deterministic_inference": seeded}).connected() as engine:
            return engine.supports_seeds

    assert asyncio.run(once()) is seeded


def test_a_scripted_engine_says_what_it_is_told():
    engine = apr.ScriptedEngine(lambda request, prompt: "", supports_seeds=False)
    assert not engine.supports_seeds
    engine.loads = measured((1.0, 0.01))
    assert asyncio.run(engine.load()) is engine.loads
    assert apr.ScriptedEngine(lambda request, prompt: "").supports_seeds
