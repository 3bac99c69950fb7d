"""The loop on an `sgl.Engine`, compared with the same model over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import requests

import sgl_apr as apr
from sgl_apr.server.launch import server_folder
from sgl_apr.server.launch.launcher import Server
from tests.support.processes import until

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(600)]
OPTIONS = {"mode": "parallel", "temperature": 0}
BUDGET = {"tokens": 250, "width": 4}
PROMPTS = ["Q: ", "The model thinks about", "1: the first thread"]


@pytest.fixture(scope="module")
def report(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `local_engine.py` saw; it ends by itself, with all of its processes."""
    directory = tmp_path_factory.mktemp("local")
    model = requests.get(f"{server.url}/model_info", timeout=30).json()["model_path"]
    arguments = {
        "model": model,
        "prompts": PROMPTS,
        "options": OPTIONS,
        "budget": BUDGET,
        "path": str(directory / "many"),
    }
    script = Path(__file__).parents[1] / "support" / "in_process_engine.py"
    command = [sys.executable, str(script), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "path": arguments["path"]}


@pytest.fixture(scope="module")
def by_http(server: Server) -> list[apr.Trajectory]:
    requests.post(f"{server.url}/flush_cache", timeout=30)
    return [apr.run(server.url, p, "threadweaver", budget=apr.Budget(**BUDGET), **OPTIONS) for p in PROMPTS]


def test_it_is_what_http_gives(report: dict, by_http: list[apr.Trajectory]):
    local = [apr.Trajectory.from_json(text) for text in report["trajectories"]]
    for one, other in zip(local, by_http, strict=True):
        apr.dialect("threadweaver").validate(one.text)
        assert one.blocks
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
        # How much two branches at once find of each other is a matter of luck.
        assert [counts(one, "branch"), counts(one)] == [counts(other, "branch"), counts(other)]


def counts(trajectory: apr.Trajectory, phase: str = "") -> list[tuple]:
    """What the engine reported for the requests of a phase, or for all but the branches."""
    return sorted(
        (c.phase, c.path, c.prompt_tokens, c.reprefilled_tokens if phase else c.cached_tokens)
        for c in trajectory.calls
        if (c.phase == phase if phase else c.phase != "branch")
    )


def test_it_leaves_no_files(report: dict):
    assert report["files_while_running"] >= 3
    assert report["files_after"] == []


def test_events_come_as_they_do_over_http(report: dict, by_http: list[apr.Trajectory]):
    assert report["deltas"] == sorted(by_http[0].text)


def test_without_a_listener_chunks_are_few(report: dict):
    quiet, listened = report["chunks"]
    assert 0 < quiet < listened / 2


def test_many_at_once(report: dict, by_http: list[apr.Trajectory]):
    outcomes = dict(apr.read_many(report["path"]))
    assert {name: t.text for name, t in outcomes.items()} == {str(i): t.text for i, t in enumerate(by_http)}


def test_what_the_engine_refuses(report: dict):
    """A run checks the names of its options itself. The engine checks those of a request, and adapters."""
    name, status, message = report["refused"]["warmth"]
    assert (name, status) == ("AprError", None)
    assert message.startswith("no option 'warmth', expected some of ")
    assert "temperature" in message
    for what, quoted in (("warmth of a request", "warmth"), ("lora_path", "nobody")):
        name, status, message = report["refused"][what]
        assert (name, status) == ("EngineError", 400)
        assert quoted in message


def test_a_prompt_that_its_context_does_not_hold(report: dict):
    name, _, message = report["overlong"]
    assert name == "BudgetExceeded"
    assert "the prompt has 150000 tokens" in message


def test_a_cancelled_trajectory_leaves_nothing(report: dict):
    assert report["cancelled"] == {"states": 0, "running": 0, "used": 0}


def test_silence_is_a_timeout(report: dict):
    assert report["silence"] == ["EngineTimeout", 0]


def test_another_event_loop_is_refused(report: dict):
    assert report["elsewhere"][0] == "UnsupportedEngine"
    assert "another event loop" in report["elsewhere"][1]
    assert report["inside"][0] == "AprError"
    assert "await" in report["inside"][1]


def test_the_load_of_an_engine(report: dict):
    assert report["load"]["running"] == 0
    assert report["load"]["max_tokens"] > 1000
    assert report["load"]["steps"]


def test_nothing_is_left_of_its_processes(report: dict):
    assert report["children"] >= 2
    assert report["children_after"] == []


WITH_METRICS = """
import sys, time
import sgl_apr as apr

if __name__ == "__main__":
    engine = apr.LocalEngine.launch(sys.argv[1], enable_metrics=True)
    engine.run("Q: ", "threadweaver", budget=apr.Budget(tokens=20))
    print("ready", flush=True)
    time.sleep(600)
"""


def test_the_next_start_removes_what_a_killed_process_has_left(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With metrics too, for which SGLang makes a folder."""
    model = requests.get(f"{server.url}/model_info", timeout=30).json()["model_path"]
    script = tmp_path / "with_metrics.py"
    script.write_text(WITH_METRICS)
    with tempfile.TemporaryDirectory() as directory:  # with a short name, for sockets
        base = Path(directory)
        environment = {k: v for k, v in os.environ.items() if k != server_folder.METRICS_ENV}
        process = subprocess.Popen(
            [sys.executable, str(script), model],
            env={**environment, "TMPDIR": directory},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert any(line == "ready\n" for line in process.stdout)
            assert list(base.glob(f"{server_folder.PREFIX}*/metrics/**/*.db"))
            assert not list(base.glob("tmp*/*")), "all is in one folder; CUDA's packages make empty ones"
        finally:
            process.kill()
            process.wait()
        monkeypatch.setattr(server_folder, "_base_folder", lambda: base)

        def is_clean() -> bool:
            server_folder.ServerFolder().remove()
            return not list(base.glob(f"{server_folder.PREFIX}*"))

        until(is_clean, 60)  # the processes of the engine notice that theirs is gone
