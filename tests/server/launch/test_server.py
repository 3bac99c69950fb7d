"""A real server: what it prints, how it answers, and that it leaves no process."""

from __future__ import annotations

import json
import signal
import subprocess
import urllib.request
from pathlib import Path

import psutil
import pytest

from sgl_apr.server.launch import preflight
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import random_llama
from tests.support.processes import SERVE, in_session

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]


def ask(url: str, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return random_llama(tmp_path_factory.mktemp("model"))


def test_the_plugin_took_effect(server: Server):
    info = ask(server.url, "/server_info")
    assert info["attention_backend"] == "apr_cpu" or info["device"] != "cpu"
    assert (info["grammar_backend"], info["schedule_policy"]) == ("llguidance", "lpm")


def test_greedy_decoding_does_not_depend_on_the_batch(server: Server):
    prompts = ["The model thinks about", "If x is more than y, then", "1: the first thread"]
    sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    separate = [ask(server.url, "/generate", {"text": text, "sampling_params": sampling}) for text in prompts]
    body = {"text": prompts * 3, "sampling_params": sampling}
    batch = ask(server.url, "/generate", body)
    assert [answer["output_ids"] for answer in batch] == [answer["output_ids"] for answer in separate] * 3


def test_a_lark_grammar_constrains(server: Server):
    sampling = {"temperature": 1, "max_new_tokens": 32, "ebnf": 'start: "<" /[0-9]{3}/ ">"'}
    text = ask(server.url, "/generate", {"text": "Number: ", "sampling_params": sampling})["text"]
    assert text[0] + text[-1] == "<>"
    assert text[1:-1].isdigit()


def test_serve_prints_one_line_and_stops_cleanly(model):
    port = str(preflight.free_port())
    command = [
        *SERVE,
        f"--model={model}",
        "--port",
        port,
        "--max-total-tokens",
        "2048",
        "--context-length=512",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        line = launcher.stdout.readline()
        (child,) = psutil.Process(launcher.pid).children()
        assert len(in_session(child.pid)) >= 3
        commands = [" ".join(process.cmdline()) for process in child.children(recursive=True)]
        assert not [c for c in commands if "multiprocessing" in c], (
            "all processes are forks: none imported SGLang again"
        )
        assert ask(f"http://127.0.0.1:{port}", "/server_info")["max_total_tokens"] == 2048
        launcher.send_signal(signal.SIGTERM)
        rest, log = launcher.communicate(timeout=60)
    assert line == f"sgl-apr ready: http://127.0.0.1:{port} (model {model}, cpu, apr_cpu)\n"
    assert (rest, launcher.returncode) == ("", 0)
    assert "sgl-apr: error" not in log
    assert not in_session(child.pid)


@pytest.mark.slow
def test_the_context_manager_leaves_no_process_when_its_body_raises(model):
    server = Server(model, context_length=512, max_total_tokens=2048)

    def body() -> None:
        with server:
            pids.append(server.pid)
            assert len(in_session(server.pid)) >= 3
            assert ask(server.url, "/server_info")["context_length"] == 512
            raise ZeroDivisionError

    pids: list[int] = []
    with pytest.raises(ZeroDivisionError):
        body()
    assert not in_session(*pids)
