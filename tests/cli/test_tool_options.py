"""The arguments `--tool` and `--mcp`."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
from pathlib import Path

import pytest

from sgl_apr.cli.main import main
from sgl_apr.cli.tool_options import add_tool_arguments, connect_tools, load_tool_arguments
from sgl_apr.errors import AprError, McpError
from tests.runtime.tools.test_mcp import raw


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_tool_arguments(parser)
    return parser.parse_args(argv)


def test_functions_of_modules_are_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cli_tools.py").write_text("def add(a: int) -> int:\n    return a\n\nboth = [add]\n")
    monkeypatch.chdir(tmp_path)
    assert [tool.name for tool in load_tool_arguments(parse("--tool", "cli_tools:both"))] == ["add"]
    assert load_tool_arguments(parse()) == []
    with pytest.raises(AprError, match="--tool cli_tools:ad: no name 'ad', did you mean 'add'"):
        load_tool_arguments(parse("--tool", "cli_tools:ad"))


def test_a_command_or_a_url_is_a_server():
    async def names(*argv: str) -> list[str]:
        async with connect_tools(parse(*argv)) as tools:
            return [tool.name for tool in tools]

    assert "structured" in asyncio.run(names("--mcp", shlex.join(raw())))
    assert asyncio.run(names()) == []
    with pytest.raises(McpError, match=r"MCP server http://127\.0\.0\.1:1/mcp"):
        asyncio.run(names("--mcp", "http://127.0.0.1:1/mcp"))


def test_a_choice_needs_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (tmp_path / "cli_tools.py").write_text("def add(a: int) -> int:\n    return a\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AprError, match="--tool-choice is for tools, expected --tool or --mcp"):
        load_tool_arguments(parse("--tool-choice", "required"))
    arguments = ["run", "hi", "--url", "http://127.0.0.1:9", "--tool", "cli_tools:add"]
    for choice, message in (
        ("ad", "--tool-choice ad, expected auto, none, required, or a tool: add"),
        ("add", "no server at"),
    ):
        assert main([*arguments, "--tool-choice", choice]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.server
def test_a_run_that_has_to_call_a_tool(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (tmp_path / "twice_tools.py").write_text("def twice(a: int) -> int:\n    return 2 * a\n")
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--tool",
        "twice_tools:twice",
        "--tool-call-parser",
        "hermes",
        "--budget",
        "tokens=300,tool_calls=1",
    ]
    for choice, calls in (("twice", 1), ("none", 0)):
        assert main(["run", "hi", "--url", server.url, *arguments, "--tool-choice", choice, "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["tool_calls"]) == calls
