"""Two real replicas behind SGLang's own router: a trajectory stays where its prefix is, and outlives that replica."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import sglang as sgl
from processes import in_session, until

import sgl_apr as apr
from sgl_apr.engine.replicas import key_of, rank_of
from sgl_apr.models import random_llama
from sgl_apr.server import preflight
from sgl_apr.server.launch import Server

BUDGET = apr.Budget(tokens=500, width=3, outline_chars=8)
ASKED = {"mode": "parallel", "temperature": 1.0, "budget": BUDGET, "retry": apr.Retry(8, 0.2)}


def test_one_key_for_a_trajectory():
    assert key_of("apr-abc-0001") == key_of("apr-abc-0002") == "apr-abc"
    assert {rank_of(f"apr-{i}", 4) for i in range(50)} == {0, 1, 2, 3}
    assert rank_of("apr-abc", 4) == rank_of("apr-abc", 4)


@dataclass(frozen=True)
class Fleet:
    url: str
    replicas: tuple[Server, Server]
    logs: tuple[Path, Path]

    def prefills(self) -> list[int]:
        """How many batches each has prefilled so far."""
        return [log.read_text(errors="replace").count("Prefill batch") for log in self.logs]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("replicas")
    return random_llama(directory, tags=apr.dialect("multiverse").tags, tag_bias=3.0)


@pytest.fixture(scope="module")
def fleet(model: Path) -> Iterator[Fleet]:
    options = {"max_total_tokens": 8192, "context_length": 1024}
    with ExitStack() as stack:
        logs = (model / "0.log", model / "1.log")
        replicas = [stack.enter_context(Server(model, log_path=log, **options)) for log in logs]
        port, metrics = preflight.free_port(), preflight.free_port()
        argv = ["--worker-urls", *(r.url for r in replicas), "--policy", "manual", "--port", str(port)]
        argv += ["--prometheus-port", str(metrics), "--health-check-interval-secs", "2"]
        out = stack.enter_context((model / "router.log").open("wb"))
        router = subprocess.Popen(
            [sys.executable, "-m", "sglang_router.launch_router", *argv], stdout=out, stderr=out
        )
        stack.callback(router.wait, 30)
        stack.callback(router.terminate)
        url = f"http://127.0.0.1:{port}"
        until(lambda: registered(url) == 2, 120)
        yield Fleet(url, (replicas[0], replicas[1]), logs)


def registered(url: str) -> int:
    try:
        return int(requests.get(f"{url}/workers", timeout=5).json()["total"])
    except requests.ConnectionError:
        return 0


async def ask(url: str, name: str, count: int, **options) -> list[apr.Trajectory]:
    async with await apr.HttpEngine.connect(url, patience=60) as engine:
        asked = (apr.areason(engine, f"Question {i}: ", name, **{**ASKED, **options}) for i in range(count))
        return await asyncio.gather(*asked)


pytestmark = pytest.mark.timeout(600)


@pytest.mark.slow
@pytest.mark.server
def test_all_requests_reach_the_replica_that_has_the_prefix(fleet: Fleet):
    before = fleet.prefills()
    found = asyncio.run(ask(fleet.url, "multiverse", 12))
    for trajectory in found:
        apr.dialect("multiverse").validate(trajectory.text)
        for call in trajectory.calls[1:]:
            if call.phase in ("branch", "commit"):
                assert call.cached_tokens >= call.shared_tokens - 1
    assert all(now > then for now, then in zip(fleet.prefills(), before, strict=True)), "both had work"


@pytest.mark.slow
@pytest.mark.server
def test_layouts_do_not_come_through_a_router(fleet: Fleet):
    with pytest.raises(apr.KvJoinUnavailable):
        asyncio.run(ask(fleet.url, "multiverse", 1, join="kv"))


@pytest.mark.slow
@pytest.mark.server
def test_a_program_and_its_forks_keep_to_one_replica(fleet: Fleet):
    @sgl.function
    def program(s, question):
        s += question + sgl.gen("first", max_tokens=1)
        parts = s.fork(3)
        for part in parts:
            part += sgl.gen("x", max_tokens=4)
        s += apr.reason("answer", "multiverse", mode="parallel", budget=BUDGET)
        for part in parts:
            assert part.get_meta_info("x")["cached_tokens"] >= part.get_meta_info("x")["prompt_tokens"] - 2

    with apr.Endpoint(fleet.url) as endpoint:
        for i in range(4):
            state = program.run(f"Program {i} has a prompt that is long enough to tell: ", backend=endpoint)
            trajectory = state.get_meta_info("answer")["trajectory"]
            assert trajectory.calls[0].cached_tokens >= trajectory.calls[0].prompt_tokens - 2


@pytest.mark.slow
@pytest.mark.server
def test_the_requests_of_who_gives_up_are_aborted_on_the_replicas(fleet: Fleet):
    async def once() -> apr.Load:
        async with await apr.HttpEngine.connect(fleet.url) as engine:
            task = asyncio.create_task(
                engine.decode(apr.Request("apr-long-1", tuple(range(300, 340)), 900, {"ignore_eos": True}))
            )
            for _ in range(100):
                await asyncio.sleep(0.1)
                engine._stale = 0.0
                if (await engine.load()).running:
                    break
            assert not task.done()
            task.cancel()
            for _ in range(50):
                await asyncio.sleep(0.1)
                engine._stale = 0.0
                load = await engine.load()
                if not load.running:
                    break
            return load

    assert asyncio.run(once()).running == 0


@pytest.mark.slow
@pytest.mark.server
def test_a_replica_that_dies_costs_a_prefill_and_not_the_answer(fleet: Fleet):
    """The last test: it leaves one replica."""

    async def once() -> list[apr.Trajectory]:
        task = asyncio.create_task(ask(fleet.url, "multiverse", 16))
        await asyncio.sleep(2)
        assert not task.done()
        for process in in_session(fleet.replicas[0].pid):
            os.kill(process, signal.SIGKILL)
        return await task

    found = asyncio.run(once())
    assert len(found) == 16
    for trajectory in found:
        apr.dialect("multiverse").validate(trajectory.text)
        assert all(b.outcome != "failed" for block in trajectory.blocks for b in block.branches)
    assert any(c.retries for t in found for c in t.calls)
