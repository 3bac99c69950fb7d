"""TRL and verl, in environments of their own, train on what our runtime samples on a real server.

Each trainer computes the log-probabilities of what it trains on by its own code, which have to be those of the server.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS
from sgl_apr.server.launch.launcher import Server
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
PROGRAMS = ROOT / "tests" / "training" / "programs"
SPAWN_MODEL = ROOT / "sgl_apr" / "training" / "models" / "countdown-spawn"
CLOSE = 1e-3  # between log-probabilities


def trainer_python(name: str) -> Path:
    """The interpreter of a trainer's environment, which make creates if its pins have changed."""
    subprocess.run(["make", "-s", f".venv-{name}/.ready"], cwd=ROOT, check=True, timeout=1200)
    return ROOT / f".venv-{name}" / "bin" / "python"


def run_program(name: str, program: str, *argv: object) -> dict:
    """What a program prints in the environment of a trainer."""
    # One thread: those of a trainer and a server would wait for one another on a few cores, most of the time for such models.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [trainer_python(name), PROGRAMS / program, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def own_server(forked_server: type[Server], tmp_path: Path) -> Iterator[Server]:
    """A server whose weights a test may change."""
    model = shutil.copytree(SPAWN_MODEL, tmp_path / "model")
    with forked_server(model, log_path=tmp_path / "server.log", **SERVER_OPTIONS) as server:
        yield server


@pytest.mark.server
def test_trl_trains_on_every_branch(own_server: Server, tmp_path: Path):
    found = run_program(
        "trl", "trl_steps.py", "--url", own_server.url, "--model", tmp_path / "model", "--steps", 4
    )
    assert (found["steps"], len(found["rewards"])) == (4, 2), "two updates for each of two batches"
    assert max(found["difference"]) < CLOSE
    assert found["losses"] == found["decoded"], "each decoded token has one loss"
    assert all(rows > count for rows, count in zip(found["rows"], found["trajectories"], strict=True))
    assert all(found["forked"])
    assert found["versions"] == [["default"], ["2"]], "the server has the weights after the second update"
    assert all(found["branch_rows"])
    assert found["moved"] > 0


@pytest.mark.server
def test_verl_trains_on_every_branch(own_server: Server, tmp_path: Path):
    found = run_program(
        "verl", "verl_steps.py", "--url", own_server.url, "--model", tmp_path / "model", "--steps", 2
    )
    assert max(found["difference"]) < CLOSE
    assert max(found["verl_difference"]) < CLOSE, "as verl reports it"
    assert found["samples"] == [8, 8]
    assert all(rows > count for rows, count in zip(found["rows"], found["samples"], strict=True))
    assert found["losses"] == found["decoded"], "each decoded token has one loss"
    assert found["versions"] == [[0], [1]], "the server has the weights of the first update"
    assert all(0 <= reward <= 1.3 for reward in found["rewards"])
    assert found["moved"] > 0


def test_verl_loads_the_reward_of_an_example():
    """verl calls `compute_score` of a file that its configuration names."""
    code = (
        "import json\n"
        "from verl.trainer.ppo.reward import get_custom_reward_fn\n"
        "from omegaconf import OmegaConf\n"
        "function = {'path': 'examples/verl_reward.py', 'name': 'compute_score'}\n"
        "score = get_custom_reward_fn(OmegaConf.create({'reward': {'custom_reward_function': function}}))\n"
        "replies = ['! 5- 4= 1, 1+ 19= 20', '! 5- 4= 1, 4+ 19= 20']\n"
        "print(json.dumps([score('countdown', reply, ' 20: 4 5 19', {}) for reply in replies]))"
    )
    done = subprocess.run(
        [trainer_python("verl"), "-c", code],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [1.0, 0.0]


def test_verl_takes_the_configuration_of_the_example():
    """All names are those of verl's configuration; what they start needs GPUs."""
    done = subprocess.run(
        ["bash", "examples/verl_grpo.sh", "trainer.n_gpus_per_node=8", "--cfg", "job"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHON": str(trainer_python("verl"))},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "default_agent_loop: sgl_apr" in done.stdout
    assert "grammar_backend: llguidance" in done.stdout
