"""Drills on a real server: processes that are killed or stopped, and restarts under a batch and an evaluation."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS
from sgl_apr.server.launch import preflight
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import locate_model, random_llama
from tests.support.drills import COMMAND, error_lines, nothing_left, run_command, scheduler_of
from tests.support.processes import SERVE, in_session, until

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(600)]

SECONDS = 15  # within which a failure has to be reported, on a busy machine
BUDGET = apr.Budget(tokens=150, width=3, branch_tokens=12, outline_chars=8)
PROBLEMS = {f"p{i}": f"Problem {i}: " for i in range(150)}
OPTIONS = {"max_total_tokens": 16384, "context_length": 1024}
EVAL = ["eval", "countdown", "--limit", "200", "--at-once", "24", "--json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(
        tmp_path_factory.mktemp("drilled"), tags=apr.dialect("threadweaver").tags, tag_bias=0.0
    )


@pytest.fixture(scope="module")
def running(forked_server: type[Server], model: Path) -> Iterator[Server]:
    """A server that survives its drill."""
    with forked_server(model, log_path=model / "log", **OPTIONS) as server:
        yield server


class Background:
    """Runs a function in a thread, and returns its result or raises its error."""

    def __init__(self, function: Any, *args: Any, **kwargs: Any) -> None:
        self._result: list[Any] = []
        self.error: BaseException | None = None

        def work() -> None:
            try:
                self._result.append(function(*args, **kwargs))
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def result(self, seconds: float) -> Any:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"not ended after {seconds} s"
        if self.error:
            raise self.error
        return self._result[0]


def batch(url: str, path: Path, **options: Any) -> apr.Outcomes:
    return apr.run_many(
        url, PROBLEMS, path, concurrency=40, mode="parallel", temperature=1.0, budget=BUDGET, **options
    )


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_batch(path: Path) -> None:
    """Every problem is in the file, once, with a complete trajectory."""
    outcomes = list(apr.read_many(path))
    assert sorted(name for name, _ in outcomes) == sorted(PROBLEMS)
    for name, trajectory in outcomes:
        assert trajectory.prompt == PROBLEMS[name]
        apr.dialect("threadweaver").validate(trajectory.text)


def is_idle(url: str) -> bool:
    """Whether no request runs or waits, and only the cache holds KV tokens."""

    async def load() -> apr.Load:
        async with await apr.HttpEngine.connect(url) as engine:
            return await engine.load()

    found = asyncio.run(load())
    return (found.running, found.waiting, found.used_tokens) == (0, 0, 0)


def test_the_scheduler_is_killed_under_a_batch(forked_server: type[Server], model: Path, tmp_path: Path):
    path, port = tmp_path / "out.jsonl", preflight.free_port()
    with forked_server(model, port, **OPTIONS) as server, nothing_left(server):
        work = Background(batch, server.url, path, reconnect_timeout=0)
        until(lambda: lines(path) >= 20, 120)
        leader = server.pid
        scheduler_of(leader).kill()
        outcomes = work.result(SECONDS)
        before = path.read_bytes()
        assert outcomes.failed
        assert {type(error) for error in outcomes.failed.values()} <= {apr.EngineError, apr.BranchFailed}
        assert len(outcomes.finished) == before.count(b"\n") >= 20, "every finished answer is on the disk"
        with pytest.raises(apr.EngineError):
            apr.run(server.url, "Q: ")
        until(lambda: not in_session(leader), SECONDS)
        server.stop()
    with forked_server(model, port, **OPTIONS) as server:
        resumed = batch(server.url, path)
    assert sorted(resumed.skipped) == sorted(outcomes.finished), "no work is done twice"
    assert (len(resumed.finished), resumed.failed) == (len(PROBLEMS) - len(outcomes.finished), {})
    assert path.read_bytes().startswith(before)
    check_batch(path)


def test_serve_ends_when_its_scheduler_is_killed(model: Path):
    command = [*SERVE, f"--model={model}", "--port", str(preflight.free_port()), "--max-total-tokens", "2048"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline().startswith("sgl-apr ready: ")
        (child,) = psutil.Process(launcher.pid).children()
        scheduler_of(child.pid).kill()
        _, log = launcher.communicate(timeout=30)
    assert launcher.returncode == 1
    (line,) = [line for line in log.splitlines() if line.startswith("sgl-apr: error:")]
    assert "the server stopped by itself" in line
    assert not in_session(child.pid)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_http_process_is_stopped_for_ten_seconds(running: Server, tmp_path: Path):
    path = tmp_path / "out.jsonl"
    work = Background(batch, running.url, path)
    until(lambda: lines(path) >= 10, 120)
    with stopped(running.pid):
        begin = time.monotonic()
        with pytest.raises(apr.EngineTimeout, match="did not answer within 2 s"):
            apr.run(running.url, "Q: ", timeout=2)
        assert time.monotonic() - begin < SECONDS
        written = lines(path)
        time.sleep(max(0.0, 10 - (time.monotonic() - begin)))
        assert lines(path) <= written + 40, "nothing is answered meanwhile"
    outcomes = work.result(180)
    assert (len(outcomes.finished), outcomes.failed) == (len(PROBLEMS), {})
    check_batch(path)
    until(lambda: is_idle(running.url), 30)


def test_requests_that_time_out_leave_nothing_on_the_server(running: Server):
    async def many() -> list[Any]:
        async with await apr.HttpEngine.connect(running.url, timeout=2) as engine:
            tasks = [
                asyncio.create_task(
                    apr.areason(engine, f"Q{i}: ", "threadweaver", mode="parallel", temperature=1.0,
                                budget=apr.Budget(tokens=800, width=4))
                )
                for i in range(16)
            ]  # fmt: skip
            await asyncio.sleep(0.5)
            with stopped(running.pid):
                begin = time.monotonic()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert time.monotonic() - begin < SECONDS
            return results

    results = asyncio.run(many())
    failures = [r for r in results if isinstance(r, BaseException)]
    assert failures
    assert {type(error) for error in failures} <= {apr.EngineTimeout, apr.EngineError, apr.BranchFailed}
    until(lambda: is_idle(running.url), 30)
    apr.dialect("threadweaver").validate(apr.run(running.url, "Q: ", mode="parallel", budget=BUDGET).text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_is_restarted_under_a_batch(
    forked_server: type[Server], model: Path, tmp_path: Path, number: signal.Signals
):
    """The batch waits for the server, and no problem is lost."""
    path, port = tmp_path / "out.jsonl", preflight.free_port()
    with forked_server(model, port, **OPTIONS) as server, nothing_left(server):
        work = Background(batch, server.url, path)
        until(lambda: lines(path) >= 20, 120)
        if number == signal.SIGKILL:
            for process in in_session(server.pid):
                os.kill(process, number)
        server.stop()
        before = path.read_bytes()
    with forked_server(model, port, **OPTIONS) as server:
        outcomes = work.result(240)
        until(lambda: is_idle(server.url), 30)
    assert (len(outcomes.finished), outcomes.skipped, outcomes.failed) == (len(PROBLEMS), (), {})
    assert path.read_bytes().startswith(before)
    check_batch(path)


def test_the_server_is_restarted_under_an_evaluation(forked_server: type[Server], tmp_path: Path):
    """The evaluation ends with one line, and the same command completes it without doing an attempt again."""
    out, port = tmp_path / "out", preflight.free_port()
    command = [*EVAL, "--url", f"http://127.0.0.1:{port}", "-o", str(out)]
    builtin = locate_model("builtin")
    with (
        forked_server(builtin, port, **SERVER_OPTIONS) as server,
        nothing_left(server),
        subprocess.Popen(
            [*COMMAND, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as running,
    ):
        until(lambda: lines(out / "run.jsonl") >= 30 or running.poll() is not None, 240)
        for process in in_session(server.pid):
            os.kill(process, signal.SIGKILL)
        stdout, stderr = running.communicate(timeout=30)
        before = (out / "run.jsonl").read_bytes()
        server.stop()
    assert (running.returncode, stdout) == (1, "")
    (line,) = error_lines(stderr)
    assert str(port) in line
    assert before.endswith(b"\n")
    attempts = before.count(b"\n") - 1
    assert 30 - 1 <= attempts < 200
    with forked_server(builtin, port, **SERVER_OPTIONS):
        status, stdout, stderr, _ = run_command(command, timeout=400, progress=out / "run.jsonl")
    assert (status, error_lines(stderr)) == (0, [])
    after = (out / "run.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 201
    numbers = [json.loads(attempt)["number"] for attempt in after.splitlines()[1:]]
    assert sorted(numbers) == list(range(200)), "each problem has one attempt"
    assert json.loads(stdout)["rows"][0]["problems"] == 200
