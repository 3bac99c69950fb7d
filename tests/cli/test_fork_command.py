"""The command `sgl-apr fork`: what it reads, refuses and prints."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from sgl_apr.cli.main import main


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "report.txt"
    path.write_text("The bridge was built in 1931. " * 10)
    return path


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (" \n", [], "is empty, expected the context that all tasks share"),
        (b"\xff", [], "is not UTF-8 text"),
        ("a", ["--task", "x"], "tasks 1 and 2 are the same"),
        ("a", ["--task", " "], "expected text that is not empty"),
        ("a", ["--join", "kv"], "--join is for a merge, expected --merge"),
        ("a", ["--tool-choice", "required"], "--tool-choice is for tools, expected --tool or --mcp"),
        ("a", ["--tool", "no_such_module:f"], "--tool no_such_module:f: the module cannot be imported"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text, arguments, message):
    path = tmp_path / "context.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["fork", "--context", str(path), "--task", "x", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_json_file_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "chat.json"
    path.write_text("{")
    assert main(["fork", "--context", str(path), "--task", "x"]) == 1
    assert "chat.json is not JSON" in capsys.readouterr().err


@pytest.mark.server
def test_a_fork_on_a_server(server, context: Path, tmp_path: Path, capsys, monkeypatch):
    arguments = [
        "--url",
        server.url,
        "--task",
        "Risks?",
        "--task",
        "Costs?",
        "--max-tokens",
        "5",
        "--budget",
        "tokens=60",
    ]
    assert main(["fork", "--context", str(context), *arguments, "--merge", "Summary.", "--live"]) == 0
    shown = capsys.readouterr().out
    assert "Risks?" in shown
    assert "prompt tokens cached" in shown
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": context.read_text()}]))
    assert (
        main(["fork", "--context", str(chat), *arguments, "--merge", "Summary.", "--join", "kv", "--json"])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert [worker["usage"]["output_tokens"] for worker in result["results"]] == [5, 5]
    assert all(w["usage"]["cached_tokens"] >= result["shared_tokens"] - 1 for w in result["results"])
    assert [join["by"] for join in result["trajectory"]["joins"]] == ["kv"]
    monkeypatch.setattr("sys.stdin", io.StringIO(context.read_text()))
    assert main(["fork", "--context", "-", *arguments, "--raw", "--json"]) == 0
    prompt = json.loads(capsys.readouterr().out)["trajectory"]["spans"][0]["text"]
    assert prompt == context.read_text()
