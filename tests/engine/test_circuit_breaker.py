"""Servers that go down and come back: which requests wait, which fail, and which are aborted."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

import sgl_apr as apr
from sgl_apr.engine import circuit_breaker
from sgl_apr.engine.circuit_breaker import CircuitBreaker
from tests.support.fake_sglang_server import TOKENIZER, SglangServer

URL = "http://server"


class Probe:
    """Fails `failures` times, then succeeds; counts how often and how many at once."""

    def __init__(self, failures: float = math.inf, takes: float = 0.0) -> None:
        self.failures, self.takes = failures, takes
        self.calls = self.now = self.max_parallel = 0

    async def __call__(self) -> None:
        self.calls += 1
        self.now += 1
        self.max_parallel = max(self.max_parallel, self.now)
        try:
            await asyncio.sleep(self.takes)
        finally:
            self.now -= 1
        if self.calls <= self.failures:
            raise ConnectionRefusedError("refused")


def down(probe: Probe, reconnect_timeout: float = 0.0) -> CircuitBreaker:
    circuit = CircuitBreaker(URL, probe, reconnect_timeout)
    circuit.record_failure(ConnectionResetError("reset"))
    return circuit


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


def others() -> set[asyncio.Task]:
    return asyncio.all_tasks() - {asyncio.current_task()}


# The circuit alone


def test_up_asks_nobody():
    probe = Probe()
    asyncio.run(CircuitBreaker(URL, probe).wait_until_up())
    assert probe.calls == 0


def test_no_patience_is_one_probe_each_time():
    async def once() -> None:
        circuit = down(probe := Probe(failures=2))
        for calls in (1, 2):
            with pytest.raises(apr.EngineError, match=f"no server at {URL} for 0 s: refused") as raised:
                await circuit.wait_until_up()
            assert raised.value.status is None
            assert isinstance(raised.value.__cause__, ConnectionRefusedError)
            assert probe.calls == calls
        await circuit.wait_until_up()
        await circuit.wait_until_up()
        assert probe.calls == 3

    asyncio.run(once())


def test_all_who_wait_share_one_probe():
    async def once() -> None:
        circuit = down(probe := Probe(failures=2, takes=0.05), reconnect_timeout=60)
        await asyncio.gather(*(circuit.wait_until_up() for _ in range(500)))
        assert (probe.calls, probe.max_parallel) == (3, 1)
        assert not others()

    asyncio.run(once())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses so far, on a clock that only they move. They pass at once."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(circuit_breaker.time, "monotonic", lambda: 1000.0 + sum(pauses))
    monkeypatch.setattr(circuit_breaker.asyncio, "sleep", sleep)
    return pauses


async def refused() -> None:
    raise ConnectionRefusedError("refused")


def test_probes_back_off_until_patience_ends(clock):
    circuit = CircuitBreaker(URL, refused, reconnect_timeout=9.0)
    circuit.record_failure(ConnectionResetError())
    with pytest.raises(apr.EngineError, match="for 9 s"):
        asyncio.run(circuit.wait_until_up())
    assert clock == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 1.9])


def test_patience_counts_from_when_the_server_was_found_down(clock):
    circuit = CircuitBreaker(URL, refused, reconnect_timeout=9.0)
    circuit.record_failure(ConnectionResetError())
    clock.append(20.0)
    circuit.record_failure(ConnectionResetError())  # still the same outage
    with pytest.raises(apr.EngineError, match="for 20 s"):
        asyncio.run(circuit.wait_until_up())
    assert clock == [20.0]


def test_a_second_outage_is_waited_for_anew(clock):
    probe = Probe(failures=1)
    circuit = down(probe, reconnect_timeout=9.0)
    asyncio.run(circuit.wait_until_up())
    clock.append(100.0)
    probe.failures, before = 5, len(clock)
    circuit.record_failure(ConnectionResetError())
    asyncio.run(circuit.wait_until_up())
    assert probe.calls == 6
    assert len(clock) > before


def test_the_probe_ends_with_the_last_who_waits():
    async def once() -> None:
        circuit = down(probe := Probe(takes=3600), reconnect_timeout=60)
        waiting = [asyncio.create_task(circuit.wait_until_up()) for _ in range(3)]
        await until(lambda: probe.now == 1)
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        assert probe.now == 1
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await until(lambda: not others())
        assert (probe.calls, probe.now) == (1, 0)

    asyncio.run(once())


def test_a_probe_that_is_being_cancelled_is_not_waited_for():
    calls = 0

    async def probe() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0.1)  # as closing a connection may take

    async def once() -> None:
        circuit = CircuitBreaker(URL, probe)
        circuit.record_failure(ConnectionResetError())
        first = asyncio.create_task(circuit.wait_until_up())
        await until(lambda: calls == 1)
        first.cancel()
        await asyncio.wait([first])
        assert others()
        await circuit.wait_until_up()
        assert calls == 2

    asyncio.run(once())


def test_a_late_failure_does_not_turn_back_who_was_let_through():
    async def once() -> None:
        circuit = down(probe := Probe(failures=0))

        async def fail() -> None:
            await circuit.wait_until_up()
            circuit.record_failure(ConnectionResetError())

        await asyncio.gather(fail(), circuit.wait_until_up())
        assert probe.calls == 1
        assert circuit.error

    asyncio.run(once())


def test_closing_fails_who_waits():
    async def once() -> None:
        circuit = down(probe := Probe(takes=3600), reconnect_timeout=60)
        waiting = asyncio.create_task(circuit.wait_until_up())
        await until(lambda: probe.now == 1)
        await circuit.close()
        assert probe.now == 0
        with pytest.raises(apr.EngineError, match="no server"):
            await waiting
        assert not others()

    asyncio.run(once())


# The engine


class Restartable(SglangServer):
    """On a port of its own, with health checks that fail `unwell` times after each start, and aborts that hang."""

    def __init__(self, *, unwell: int = 0, **options) -> None:
        super().__init__(**options)
        self.port, self.unwell = unused_port(), unwell
        self.health = Probe(unwell, takes=0.02)
        self.aborting, self.let_abort = 0, asyncio.Event()
        self.let_abort.set()
        self.server: TestServer | None = None

    async def start(self) -> str:
        app = web.Application()
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/health", self._health)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        self.health = Probe(self.unwell, takes=0.02)
        self.server = TestServer(app, port=self.port)
        await self.server.start_server()
        return str(self.server.make_url("")).rstrip("/")

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.close()

    async def refuse(self) -> None:
        """Accept no more connections, and continue with the open ones."""
        assert self.server is not None
        assert self.server.runner is not None
        for site in list(self.server.runner.sites):
            await site.stop()

    async def _health(self, request: web.Request) -> web.Response:
        try:
            await self.health()
        except ConnectionRefusedError:
            return web.Response(status=503)
        return web.Response()

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborting += 1
        await self.let_abort.wait()
        return await super()._abort(request)


GONE = "no server at|broke off the answer"  # on a new connection, or on an open one


@asynccontextmanager
async def connected(fake: Restartable, **options) -> AsyncIterator[apr.HttpEngine]:
    url = await fake.start()
    try:
        async with await apr.HttpEngine.connect(url, tokenizer=TOKENIZER, **options) as engine:
            yield engine
    finally:
        await fake.stop()


def decode(engine: apr.HttpEngine, rid: str = "r", prompt: str = "Q: ") -> Awaitable[apr.Result]:
    """The phase "trunk" of the fake server; ending in "1:" the prompt is that of "branch 1"."""
    return engine.decode(apr.Request(rid, tuple(TOKENIZER.encode(prompt)), 400))


async def start_decode(engine: apr.HttpEngine, fake: Restartable, rid: str) -> asyncio.Task[apr.Result]:
    task = asyncio.ensure_future(decode(engine, rid))
    await until(lambda: rid in fake.live)
    return task


async def fails(engine: apr.HttpEngine, message: str, prompt: str = "Q: ") -> apr.EngineError:
    with pytest.raises(apr.EngineError, match=message) as raised:
        await decode(engine, "failing", prompt)
    return raised.value


def test_requests_wait_for_a_server_that_comes_back():
    async def once() -> None:
        fake = Restartable(unwell=2)
        async with connected(fake, reconnect_timeout=60) as engine:
            await decode(engine)
            assert fake.health.calls == 0
            await fake.stop()
            assert (await fails(engine, GONE)).status is None
            waiting = [asyncio.ensure_future(decode(engine, f"r{i}")) for i in range(20)]
            await asyncio.sleep(0.3)
            waiting.pop().cancel()
            assert not any(task.done() for task in waiting)
            await fake.start()
            results = await asyncio.gather(*waiting)
            assert {r.finish for r in results} == {"stop"}
            assert (fake.health.calls, fake.health.max_parallel) == (3, 1)

    asyncio.run(once())


def test_without_patience_requests_fail_at_once_until_the_server_is_back():
    async def once() -> None:
        fake = Restartable()
        async with connected(fake) as engine:
            await fake.stop()
            began = time.monotonic()
            for message in (GONE, "no server at .* for 0 s", "no server at .* for 0 s"):
                assert (await fails(engine, message)).status is None
            assert time.monotonic() - began < 5
            await fake.start()
            await decode(engine)
            assert fake.health.calls == 1

    asyncio.run(once())


def test_closing_does_not_wait_for_the_server():
    async def once() -> None:
        fake = Restartable()
        async with connected(fake, reconnect_timeout=3600) as engine:
            await fake.stop()
            await fails(engine, GONE)
            waiting = asyncio.ensure_future(decode(engine))
            await asyncio.sleep(0.1)
        with pytest.raises(apr.EngineError, match="no server at"):
            await waiting
        await until(lambda: not others())

    asyncio.run(once())


CLASSES = {  # failure: its message, its status, and whether the server is in doubt after it
    "dies": ("broke off the answer", None, True),
    "ends early": ("without a finish reason", None, False),
    "aborts": ("aborted the request", None, False),
    "status 500": ("out of memory", 500, False),
    "reports an error": ("KV cache is full", 507, False),
    "sends no JSON": ("does not answer like an SGLang server", None, False),
    "stops sending": ("did not answer within", None, False),
}


@pytest.mark.parametrize("failure", CLASSES)
def test_what_is_told_of_a_failure(failure):
    message, status, doubt = CLASSES[failure]

    async def once() -> None:
        fake = Restartable(branch_1=failure)
        async with connected(fake, timeout=1.0) as engine:
            error = await fails(engine, message, "1:")
            assert error.status == status
            assert isinstance(error, apr.EngineTimeout) == (failure == "stops sending")
            await decode(engine)
            assert fake.health.calls == doubt

    asyncio.run(once())


# Aborts


def test_who_gives_up_does_not_wait_for_the_abort():
    async def once() -> None:
        fake = Restartable(trunk="is slow")
        async with connected(fake) as engine:
            fake.let_abort.clear()
            cancelled = await start_decode(engine, fake, "cancelled")
            kept = await start_decode(engine, fake, "kept")
            began = time.monotonic()
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert time.monotonic() - began < 1  # otherwise the abort would take 5 s
            await until(lambda: fake.aborting == 1)
            assert not fake.aborted
            fake.let_abort.set()
            await engine.abort("canc")
            assert fake.aborted == {"cancelled"}
            await engine.abort("canc")  # no longer known
            assert fake.aborting == 1
        assert fake.aborted == {"cancelled", "kept"}
        with pytest.raises(apr.EngineError):
            await kept
        await until(lambda: not others())
        assert not engine._active_rids
        assert not engine._aborts

    asyncio.run(once())


@pytest.mark.parametrize("cancelled", [False, True], ids=["under way", "cancelled itself"])
def test_closing_delivers_the_abort_of_what_was_cancelled(cancelled):
    async def once() -> None:
        fake = Restartable(trunk="is slow")
        async with connected(fake) as engine:
            fake.let_abort.clear()
            task = await start_decode(engine, fake, "cancelled")
            task.cancel()
            await asyncio.wait([task])
            await until(lambda: fake.aborting == 1)
            if cancelled:  # as a program's end cancels every task there is
                for abort in engine._aborts.values():
                    abort.cancel()
                await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.2, fake.let_abort.set)
        assert fake.aborted == {"cancelled"}
        assert fake.aborting == 1 + cancelled

    asyncio.run(once())


def test_one_answer_broken_off_does_not_keep_others_from_being_aborted():
    async def once() -> None:
        fake = Restartable(trunk="is slow", branch_1="dies")
        async with connected(fake) as engine:
            task = await start_decode(engine, fake, "cancelled")
            await fails(engine, "broke off the answer", "1:")
            task.cancel()
            await asyncio.wait([task])
            await until(lambda: "cancelled" in fake.aborted)

    asyncio.run(once())


def test_nothing_is_aborted_where_nobody_listens():
    async def once() -> None:
        fake = Restartable(trunk="is slow")
        async with connected(fake) as engine:
            task = await start_decode(engine, fake, "cancelled")
            await fake.refuse()
            await fails(engine, GONE)
            again = TestServer(aborts := web.Application(), port=fake.port)
            aborts.router.add_post("/abort_request", fake._abort)
            await again.start_server()
            task.cancel()
            await asyncio.wait([task])
            await engine.abort("")
            await again.close()
        assert fake.aborting == 0

    asyncio.run(once())
