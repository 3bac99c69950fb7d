"""Examples as they are: an answer in time on the model that comes with the package, and programs by a random one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.paths import EXAMPLES


def run(name: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """What an example printed last, and all of it."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.server
def test_answers_come_in_time(solver):
    figures, said = run("deadline.py", "--url", solver.url, "--count", "3", "--seconds", "3")
    assert figures["ok"], figures
    assert figures["problems"] == 3
    assert figures["solved"] >= 1, "the first has three numbers and takes no fork"
    assert figures["in_time"] <= figures["branches"]
    assert "(right, no fork)" in said


@pytest.mark.server
def test_programs_are_tried(server):
    figures, said = run("coding.py", "--url", server.url, "--tries", "2")
    assert figures["tries"] == 2 * figures["exercises"]
    assert figures["solved"] <= figures["exercises"], "a random model has luck at the most"
    assert "def double(n):" in said


@pytest.mark.slow
def test_programs_of_a_small_model_pass_their_tests():
    figures, _ = run("coding.py")
    assert figures["solved"] >= 2
