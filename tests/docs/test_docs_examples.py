"""Examples run as scripts: answers in time by the built-in model, and programs by a random one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.paths import EXAMPLES


def run(name: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON object that an example prints last, and everything that it prints."""
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
def test_deadline_answers_in_time(solver):
    figures, output = run("deadline.py", "--url", solver.url, "--count", "3", "--seconds", "3")
    assert figures["ok"], figures
    assert figures["problems"] == 3
    assert figures["solved"] >= 1, "the first problem has three numbers and needs no fork"
    assert figures["in_time"] <= figures["branches"]
    assert "(right, no fork)" in output


@pytest.mark.server
def test_coding_counts_all_tries(server):
    figures, output = run("coding.py", "--url", server.url, "--tries", "2")
    assert figures["tries"] == 2 * figures["exercises"]
    assert figures["solved"] <= figures["exercises"], "a random model solves them only by chance"
    assert "def double(n):" in output


@pytest.mark.slow
def test_coding_solves_exercises_with_a_small_model():
    figures, _ = run("coding.py")
    assert figures["solved"] >= 2


@pytest.mark.slow
@pytest.mark.server
def test_agents_share_a_document_and_search_it_at_once(tool_server):
    figures, output = run("agents.py", "--url", tool_server.url, "--tokens", "400")
    assert figures["ok"], output
    assert (figures["workers"], figures["min_cached_share"]) == (4, 1.0)
    assert figures["tool_calls"] == figures["tools_ok"] == 4
    assert figures["gain"] > 1
    assert "North Ridge" in output


@pytest.mark.server
def test_pro_says_what_it_chose(solver):
    figures, output = run("pro.py", "--url", solver.url)
    assert figures["ok"]
    assert figures["label"] == "multiverse (exact): the model forks by itself"
    assert figures["branches"] >= 2
    assert "fork into" in output


@pytest.mark.slow
@pytest.mark.server
def test_pro_makes_one_reply_of_several(server):
    figures, output = run("pro.py", "--url", server.url, "--question", "Why?", "--tokens", "2000")
    assert figures["label"].startswith("pacore: ")
    assert f"chose {figures['label']}" in " ".join(output.split())
