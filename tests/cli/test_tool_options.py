"""The arguments `--tool` and `--mcp`."""

from __future__ import annotations

import argparse
import asyncio
import shlex
from pathlib import Path

import pytest

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
