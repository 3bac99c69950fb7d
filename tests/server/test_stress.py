"""A real server under many clients, aborts, kills and faults: no result is lost and no request is left running."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import sgl_apr as apr
from sgl_apr.server.launch import preflight
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import random_llama
from tests.support.processes import in_session, until

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

BUDGET = {"tokens": 150, "width": 3, "branch_tokens": 12, "outline_chars": 8}
CLIENT = """
import json, sys
import sgl_apr as apr
url, path, count, concurrency = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
problems = {f"p{i}": f"Problem {i}: " for i in range(count)}
outcomes = apr.run_many(url, problems, path, concurrency=concurrency, mode="parallel", temperature=1.0,
                        budget=apr.Budget(**json.loads(sys.argv[5])))
print(json.dumps([len(outcomes.finished), len(outcomes.skipped), len(outcomes.failed)]))
"""


def client(url: str, path: Path, count: int) -> subprocess.Popen:
    """Start a process that runs `count` problems in parallel."""
    argv = [sys.executable, "-c", CLIENT, url, str(path), str(count), str(count), json.dumps(BUDGET)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check(path: Path, count: int) -> list[apr.Trajectory]:
    """Check that every problem is in the file once, with a complete trajectory, and return the trajectories."""
    outcomes = list(apr.read_many(path))
    assert Counter(name for name, _ in outcomes) == Counter(f"p{i}" for i in range(count))
    for name, trajectory in outcomes:
        assert trajectory.prompt == f"Problem {name[1:]}: "
        apr.dialect("threadweaver").validate(trajectory.text)
        assert trajectory.blocks
        assert trajectory.metrics().total <= BUDGET["tokens"]
    return [trajectory for _, trajectory in outcomes]


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_batch_whose_client_is_killed_midway(server: Server, tmp_path: Path, count: int):
    path = tmp_path / "out.jsonl"
    first = client(server.url, path, count)
    until(lambda: lines(path) >= count // 4 or first.poll() is not None, 600)
    first.kill()
    first.wait()
    assert lines(path) < count, "the client was killed before it finished"
    second, memory = client(server.url, path, count), 0
    while second.poll() is None:
        try:
            memory = max(memory, psutil.Process(second.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.2)
    finished, skipped, failed = json.loads(second.communicate()[0])
    assert (finished + skipped, failed) == (count, 0)
    assert skipped >= count // 4
    took = sorted(t.wall_s for t in check(path, count)[skipped:])
    print(
        f"\n{count}: {memory / 2**20:.0f} MB, {took[0]:.1f} to {took[-1]:.1f} s, median {took[len(took) // 2]:.1f}"
    )
    # All start in parallel, and none waits forever: the slowest takes as long as the run.
    assert memory < 2 * 2**30
    until(lambda: idle(server.url), 30)


def idle(url: str) -> bool:
    """Return whether no request runs or waits, and only the cache holds KV tokens."""

    async def once() -> apr.Load:
        async with await apr.HttpEngine.connect(url) as engine:
            return await engine.load()

    load = asyncio.run(once())
    return (load.running, load.waiting, load.used_tokens) == (0, 0, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("stressed")
    return random_llama(directory, tags=apr.dialect("threadweaver").tags, tag_bias=0.0)


@pytest.fixture(scope="module")
def strict(forked_server: type[Server], model: Path) -> Iterator[Server]:
    """A server that checks its memory at every step, and exits if there is a leak."""
    environment = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with forked_server(
            model, max_total_tokens=16384, context_length=1024, log_path=model / "log"
        ) as server:
            yield server


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_midway(model: Path, tmp_path: Path):
    path, count, port = tmp_path / "out.jsonl", 150, preflight.free_port()
    options = {"max_total_tokens": 16384, "context_length": 1024}
    with Server(model, port, **options) as server:
        running = client(server.url, path, count)
        until(lambda: lines(path) >= 20, 120)
        for process in in_session(server.pid):
            os.kill(process, signal.SIGKILL)
        assert lines(path) < count
        server.stop()
        with Server(model, port, **options):
            out, _ = running.communicate(timeout=300)
    assert json.loads(out) == [count, 0, 0]
    check(path, count)


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_fifty_trajectories_that_are_cancelled(strict: Server, rounds: int):
    """Cancelled, out of time, or disconnected: the server is idle afterwards, and still answers."""
    rng, late = random.Random(0), list[float]()

    async def one(engine: apr.HttpEngine, kind: str) -> str:
        options = {"mode": "parallel", "temperature": 1.0, "budget": apr.Budget(tokens=400, width=4)}
        reconnect_timeout = rng.uniform(0.0, 1.5)
        if kind == "timeout":
            options["budget"] = apr.Budget(tokens=400, width=4, seconds=0.05 + reconnect_timeout)
        elif kind == "policy":
            # Four branches that end by themselves, one early: the others are stopped.
            options |= {
                "policy": "first",
                "min_width": 4,
                "logit_bias": {str(engine.tokenizer.special_token_id("</Thread>")): 4.0},
            }
        task = asyncio.create_task(apr.areason(engine, f"Q{rng.randrange(20)}: ", "threadweaver", **options))
        if kind == "cancel":
            await asyncio.wait([task], timeout=reconnect_timeout)
            task.cancel()
        try:
            trajectory = await task
        except asyncio.CancelledError:
            return "cancelled"
        apr.dialect("threadweaver").validate(trajectory.text)
        if kind == "timeout":
            late.append(trajectory.wall_s - options["budget"].seconds)
        outcomes = {b.outcome for block in trajectory.blocks for b in block.branches} | {trajectory.finish}
        return next((c for c in ("timeout", "aborted") if c in outcomes), "complete")

    async def disconnect(url: str) -> str:
        """A client that disconnects in the middle of a trajectory."""
        engine = await apr.HttpEngine.connect(url)
        engine._abort = lambda rid: asyncio.sleep(0)
        task = asyncio.create_task(apr.areason(engine, "Q: ", "threadweaver", mode="parallel"))
        await asyncio.wait([task], timeout=rng.uniform(0.1, 1.0))
        await engine._session.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return "disconnected"

    async def go() -> Counter[str]:
        results: Counter[str] = Counter()
        async with await apr.HttpEngine.connect(strict.url) as engine:
            for _ in range(rounds):
                kinds = rng.choices(["cancel", "timeout", "policy", "disconnect"], [4, 4, 2, 1], k=50)
                results.update(
                    await asyncio.gather(
                        *(disconnect(strict.url) if k == "disconnect" else one(engine, k) for k in kinds)
                    )
                )
        return results

    results = asyncio.run(go())
    late.sort()
    print(f"\n{dict(results)}; {late[-1]:.3f} s beyond the time limit at most")
    assert late[int(0.9 * len(late))] < 2, "a step of the engine and of this client, never a complete answer"
    assert late[-1] < 20, "also while the machine was busy with other processes"
    assert results.total() == 50 * rounds
    assert min(results[kind] for kind in ("cancelled", "timeout", "aborted", "disconnected")) >= rounds
    until(lambda: idle(strict.url), 60)
    trajectory = apr.run(strict.url, "Q: ", mode="parallel", budget=apr.Budget(tokens=200, width=3))
    apr.dialect("threadweaver").validate(trajectory.text)
    until(lambda: idle(strict.url), 30)
    log = (Path(strict._log_path)).read_text(errors="replace")  # type: ignore[arg-type]
    assert "leak" not in log.lower()
    assert "Traceback" not in log


def greedy(url: str, fault: tuple[int, ...] | None = None, **options) -> apr.Trajectory:
    """Run a greedy trajectory with four branches. The requests of branch `fault` fail half-way."""

    async def once() -> apr.Trajectory:
        async with await apr.HttpEngine.connect(url) as engine:
            real, number = engine.decode, f"{fault[-1]}:" if fault else ""

            async def decode(request: apr.Request, on_tokens=None) -> apr.Result:
                header = engine.tokenizer.decode(request.input_ids[-12:])
                if not fault or not header.endswith(f"<Thread>\n{number}"):
                    return await real(request, on_tokens)
                await real(
                    apr.Request(request.rid, request.input_ids, 5, request.sampling, request.grammar),
                    on_tokens,
                )
                raise apr.EngineError("a fault", 503)

            engine.decode = decode
            return await apr.areason(
                engine, "A question: ", "threadweaver", mode="parallel", max_blocks=1, min_width=4, temperature=0.0,
                budget=apr.Budget(tokens=600, width=4, branch_tokens=40, outline_chars=8), **options,
            )  # fmt: skip

    trajectory = asyncio.run(once())
    apr.dialect("threadweaver").validate(trajectory.text)
    return trajectory


def written(trajectory: apr.Trajectory, without: tuple[int, ...] = ()) -> list[tuple]:
    return [(s.path, s.role, s.text, s.token_ids) for s in trajectory.spans if s.path != without]


def test_greedy_runs_are_the_same(strict: Server):
    assert written(greedy(strict.url)) == written(greedy(strict.url))


def test_a_model_reasons_in_every_mode(strict: Server):
    """Sequential, parallel or as it decides, request by request, on one server."""
    budget = apr.Budget(tokens=200, width=3, outline_chars=8)
    for mode, forks in {"sequential": {False}, "parallel": {True}, "auto": {False, True}}.items():
        forked = {
            bool(apr.run(strict.url, f"Q{i}: ", mode=mode, budget=budget, temperature=1.0, seed=i).blocks)
            for i in range(2)
        }
        assert forked <= forks


@pytest.mark.parametrize("failed", ["skip", "retry"])
def test_a_fault_in_one_branch_changes_no_byte_of_the_others(strict: Server, failed: str):
    complete, faulty = (
        greedy(strict.url),
        greedy(strict.url, (1, 2), on_branch_failure=failed, retry=apr.Retry(wait=0.01)),
    )
    assert [b.outcome for b in faulty.blocks[0].branches][1] == "failed"
    assert all(b.outcome != "failed" for k, b in enumerate(faulty.blocks[0].branches) if k != 1)
    for k in (1, 3, 4):
        expected, actual = ([s for s in written(t) if s[0] == (1, k)] for t in (complete, faulty))
        assert expected == actual
    assert any(s.path == (1, 3) and s.origin == "decoded" and s.tokens > 10 for s in faulty.spans)
