"""Two real replicas of SGLang's own router: a trajectory stays on the replica that has its prefix, and survives it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import requests
import sglang as sgl

import sgl_apr as apr
from sgl_apr.engine import http
from sgl_apr.engine.routing import dp_rank, dropped_by_router, healthy_worker_urls, routing_key
from sgl_apr.server.launch import preflight
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import random_llama
from tests.support.processes import in_session, until

SMALL = {"max_total_tokens": 8192, "context_length": 1024}
BUDGET = apr.Budget(tokens=500, width=3, outline_chars=8)
OPTIONS = {"mode": "parallel", "temperature": 1.0, "budget": BUDGET, "retry": apr.Retry(8, 0.2)}


def test_one_key_for_a_trajectory():
    assert routing_key("apr-abc-0001") == routing_key("apr-abc-0002") == "apr-abc"
    assert {dp_rank(f"apr-{i}", 4) for i in range(50)} == {0, 1, 2, 3}
    assert dp_rank("apr-abc", 4) == 1, "the same in every process"


def test_what_a_router_loses_is_named():
    assert dropped_by_router(
        {"cache_salt": "a", "extra_key": "b", "sampling_params": {"logit_bias": {"5": 1.0}}}
    ) == [
        "cache_salt",
        "logit_bias",
    ]
    assert not dropped_by_router(
        {"cache_salt": None, "sampling_params": {"stop_regex": (), "temperature": 1.0}}
    )


def test_where_replicas_are():
    urls = {"http://one:1@0": True, "http://one:1@1": True, "http://two:2/": True, "http://three:3": False}
    workers = [{"url": url, "is_healthy": healthy} for url, healthy in urls.items()]
    assert healthy_worker_urls({"workers": workers}) == ["http://one:1", "http://two:2"]


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


@contextmanager
def router(log: Path, servers: Sequence[str], *more: str) -> Iterator[str]:
    """SGLang's router in front of some servers: its URL."""
    port, metrics = preflight.free_port(), preflight.free_port()
    argv = ["--worker-urls", *servers, "--policy", "manual", "--health-check-interval-secs", "2", *more]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    argv += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang_router.launch_router", *argv], stdout=out, stderr=out
        )
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: registered(url) >= len(servers), 120)
            yield url
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def fleet(model: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        logs = (model / "0.log", model / "1.log")
        replicas = [stack.enter_context(Server(model, log_path=log, **SMALL)) for log in logs]
        url = stack.enter_context(router(model / "router.log", [r.url for r in replicas]))
        yield Fleet(url, (replicas[0], replicas[1]), logs)


def registered(url: str) -> int:
    try:
        return int(requests.get(f"{url}/workers", timeout=5).json()["total"])
    except requests.ConnectionError:
        return 0


async def run_problems(url: str, count: int, **options) -> list[apr.Trajectory]:
    async with await apr.HttpEngine.connect(url, reconnect_timeout=60) as engine:
        prompts = (f"Question {uuid.uuid4()}: " for _ in range(count))
        runs = (apr.areason(engine, p, "multiverse", **{**OPTIONS, **options}) for p in prompts)
        return await asyncio.gather(*runs)


async def ask_the_server(url: str, count: int) -> list[apr.Trajectory]:
    """The same of the loop inside the server, which sends no HTTP."""

    def one(i: int) -> apr.Trajectory:
        options = {"dialect": "multiverse", "mode": "parallel", "temperature": 1.0, "budget": asdict(BUDGET)}
        answer = requests.post(
            f"{url}/apr/generate", json={"prompt": f"Inside {i}: " * 9, **options}, timeout=300
        )
        return apr.Trajectory.from_json(answer.text)

    return await asyncio.gather(*(asyncio.to_thread(one, i) for i in range(count)))


def missed(trajectories: Sequence[apr.Trajectory]) -> list[apr.Call]:
    """Return the requests whose prompts were cached less than earlier requests should have achieved.

    The last token that was sampled may have no keys yet, and after a text join all branches but the first
    are read again: there only what was before the fork has to be cached.
    """
    missed_calls = []
    for trajectory in trajectories:
        apr.dialect("multiverse").validate(trajectory.text)
        assert trajectory.blocks
        forked: dict[tuple[int, ...], int] = {}
        for call in trajectory.calls[1:]:
            if call.phase == "branch":  # its first request ends first
                forked.setdefault(call.path[:-2], call.shared_tokens)
            joined = call.phase == "after"
            expected = forked[call.path] if joined else call.shared_tokens
            assert call.cached_tokens is not None
            if call.cached_tokens < expected - 1:
                missed_calls.append(call)
    return missed_calls


def scattered(patch: pytest.MonkeyPatch) -> None:
    """Every request has a key of its own: the negative control."""
    patch.setattr(http, "routing_key", lambda rid: rid)


pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
@pytest.mark.server
def test_all_requests_of_a_trajectory_reach_one_rank(model: Path, monkeypatch: pytest.MonkeyPatch):
    """Before the fleet is started."""
    cores = 2 * sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    with Server(model, dp_size=2, log_path=model / "dp.log", **SMALL) as server:
        assert not missed(asyncio.run(run_problems(server.url, 12)))
        assert not missed(asyncio.run(ask_the_server(server.url, 12)))
        log = (model / "dp.log").read_text(errors="replace")
        assert all(f"DP{rank}] Prefill batch" in log for rank in (0, 1)), "both had work"
        with router(model / "plain.log", [server.url]) as url:
            assert not missed(asyncio.run(run_problems(url, 12)))
        with router(model / "aware.log", [server.url], "--dp-aware") as url:
            assert not missed(asyncio.run(run_problems(url, 12)))
            with pytest.raises(apr.EngineError, match="does not report its model"):
                apr.Endpoint(url)
        scattered(monkeypatch)
        assert missed(asyncio.run(run_problems(server.url, 12)))


@pytest.mark.slow
@pytest.mark.server
def test_all_requests_of_a_trajectory_reach_one_replica(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    before = fleet.prefills()
    assert not missed(asyncio.run(run_problems(fleet.url, 20)))
    assert all(now > then for now, then in zip(fleet.prefills(), before, strict=True)), "both had work"
    scattered(monkeypatch)
    assert missed(asyncio.run(run_problems(fleet.url, 20)))


@pytest.mark.slow
@pytest.mark.server
def test_layouts_do_not_come_through_a_router(fleet: Fleet):
    with pytest.raises(apr.KvJoinUnavailable):
        asyncio.run(run_problems(fleet.url, 1, join="kv"))


@pytest.mark.slow
@pytest.mark.server
def test_what_a_router_would_lose_is_an_error(fleet: Fleet):
    with pytest.raises(apr.UnsupportedEngine, match="does not forward cache_salt"):
        asyncio.run(run_problems(fleet.url, 1, cache_salt="mine"))


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
                engine._load_expires_at = 0.0
                if (await engine.load()).running:
                    break
            assert not task.done()
            task.cancel()
            for _ in range(50):
                await asyncio.sleep(0.1)
                engine._load_expires_at = 0.0
                load = await engine.load()
                if not load.running:
                    break
            return load

    assert asyncio.run(once()).running == 0


@pytest.mark.slow
@pytest.mark.server
def test_a_replica_that_dies_costs_a_prefill_and_not_the_answer(fleet: Fleet):
    """The last test: it leaves one replica."""
    dying = fleet.replicas[0]

    def running() -> int:
        return int(requests.get(f"{dying.url}/v1/loads", timeout=30).json()["loads"][0]["num_running_reqs"])

    async def once() -> list[apr.Trajectory]:
        task = asyncio.create_task(run_problems(fleet.url, 20))
        while await asyncio.to_thread(running) < 3:
            assert not task.done()
        for process in in_session(dying.pid):
            os.kill(process, signal.SIGKILL)
        return await task

    trajectories = asyncio.run(once())
    assert any(call.retries for trajectory in trajectories for call in trajectory.calls)
    trajectories += asyncio.run(run_problems(fleet.url, 4))  # new trajectories
    assert len(trajectories) == 24
    for trajectory in trajectories:
        apr.dialect("multiverse").validate(trajectory.text)
        assert all(b.outcome != "failed" for block in trajectory.blocks for b in block.branches)
