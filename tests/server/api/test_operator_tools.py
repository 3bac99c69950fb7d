"""Tools that the operator of a server names: loading them, and running them beside the event loop of the server."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sgl_apr.errors import AprError, LaunchError
from sgl_apr.runtime.tools.tool import Tool
from sgl_apr.server.api.config import parse_api_arguments
from sgl_apr.server.api.tools.operator_tools import OperatorTools, check_tools
from sgl_apr.server.api.tools.request import parse_tools, pop_tools, select_tools
from sgl_apr.server.api.tools.sources import ToolSources, load_tool_sources, tool_source
from sgl_apr.server.launch.usage import UsageError
from tests.runtime.tools.test_mcp import raw

MODULE = """
from sgl_apr import Tool

def add(a: int, b: int) -> int:
    "Add two numbers."
    return a + b

async def wait(seconds: float) -> str:
    "Wait."
    import time
    time.sleep(seconds)
    return "waited"

class Shop:
    def price(self, name: str) -> float:
        return 1.5

shop = Shop()
both = [add, Tool.from_function(wait, name="pause")]
client_run = Tool("browser")
empty = []
number = 3

def make(): return both
def broken(): raise ValueError("no key")
"""


@pytest.fixture(autouse=True)
def my_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the working directory."""
    name = f"my_tools_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import no_such_module")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


@pytest.mark.parametrize(
    ("suffix", "names"),
    [
        (":add", ["add"]), (":both", ["add", "pause"]), (":make()", ["add", "pause"]), (":shop.price", ["price"]),
    ],
)  # fmt: skip
def test_a_module_has_tools(my_tools: str, suffix: str, names: list[str]):
    assert [tool.name for tool in load_tool_sources([my_tools + suffix]).tools] == names


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("_broken:add", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("_missing:add", "cannot be imported"),
        (":ad", "no name 'ad', did you mean 'add'"),
        (":number", "a tool is 3, expected"),
        (":empty", "the list is empty"),
        (":client_run", "the tool 'browser' has no function"),
        (":broken()", "the function failed: ValueError: no key"),
    ],
)
def test_what_is_no_tool_is_a_launch_error(my_tools: str, suffix: str, expected: str):
    with pytest.raises(LaunchError, match=rf"argument --apr-tools: .*{expected}"):
        load_tool_sources([my_tools + suffix])


def test_two_tools_of_one_name_are_a_launch_error(my_tools: str):
    with pytest.raises(LaunchError, match="two tools have the name 'add'"):
        load_tool_sources([f"{my_tools}:add", f"{my_tools}:both"])


def test_the_flag_is_checked_before_anything_is_imported():
    assert tool_source("a.b:c.d()") == "a.b:c.d()"
    assert parse_api_arguments(["--apr-tools", "a:b", "--apr-tools", "x.json"])[0].tools == ("a:b", "x.json")
    with pytest.raises(argparse.ArgumentTypeError, match="expected module:name"):
        tool_source("a.b")
    with pytest.raises(UsageError, match="--apr-tools: 'nothing', expected module:name"):
        parse_api_arguments(["--apr-tools", "nothing"])


def write_servers(path: Path, **servers: Any) -> str:
    path.write_text(json.dumps({"mcpServers": servers}))
    return str(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is no JSON"),
        ("{}", "has no servers"),
        ('{"mcpServers": {"a": 1}}', "mcpServers a is 1, expected an object"),
        ('{"mcpServers": {"a": {"comand": "x"}}}', "no key of mcpServers a 'comand', did you mean 'command'"),
        ('{"mcpServers": {"a": {"command": ["x"]}}}', "a command that is text"),
        ('{"mcpServers": {"a": {"type": "sse", "url": "http://a"}}}', "type='sse', expected stdio or http"),
    ],
)
def test_a_wrong_file_is_a_launch_error(tmp_path: Path, content: str, expected: str):
    (tmp_path / "mcp.json").write_text(content)
    with pytest.raises(LaunchError, match=expected):
        load_tool_sources([str(tmp_path / "mcp.json")])
    with pytest.raises(LaunchError, match="cannot be read: No such file"):
        load_tool_sources(["missing.json"])


def test_servers_of_a_file_offer_their_tools(tmp_path: Path, my_tools: str):
    command, *args = raw()
    server = {"command": command, "args": args, "tools": ["ok", "pid"], "prefix": "raw_"}
    file = write_servers(tmp_path / "mcp.json", raw=server)

    async def main() -> None:
        tools = OperatorTools(load_tool_sources([f"{my_tools}:add", file]))
        await tools.start()
        try:
            assert [tool.name for tool in tools.tools] == ["add", "raw_ok", "raw_pid"]
            assert await tools.tools[1].function() == "done"
        finally:
            await tools.close()

    asyncio.run(main())
    wrong = write_servers(tmp_path / "wrong.json", raw={**server, "tools": ["no"]})
    with pytest.raises(LaunchError, match=r"mcpServers raw: MCP server .* has no tool 'no'"):
        asyncio.run(check_tools(load_tool_sources([wrong])))
    missing = write_servers(tmp_path / "missing.json", gone={"command": "/no/such/program"})
    with pytest.raises(LaunchError, match=r"mcpServers gone: .*No such file"):
        asyncio.run(check_tools(load_tool_sources([missing])))


def test_defaults_name_tools_that_are_there(my_tools: str):
    sources = load_tool_sources([f"{my_tools}:both"])
    asyncio.run(check_tools(sources, ["pause"]))
    with pytest.raises(
        LaunchError, match="argument --apr-default: apr tools has 'pauze', did you mean 'pause'"
    ):
        asyncio.run(check_tools(sources, ["pauze"]))


def test_an_async_tool_that_blocks_does_not_block_the_server(my_tools: str):
    async def main() -> None:
        tools = OperatorTools(load_tool_sources([f"{my_tools}:wait"]))
        await tools.start()
        longest, last, is_done = 0.0, time.monotonic(), False

        async def watch() -> None:
            nonlocal longest, last
            while not is_done:
                await asyncio.sleep(0.005)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()

        watching = asyncio.create_task(watch())
        assert await tools.tools[0].function(seconds=0.4) == "waited"
        is_done = True
        await watching
        assert longest < 0.3
        await tools.close()

    asyncio.run(main())


TOOLS = [Tool("add", function=print), Tool("pause", function=print)]


def request(*names: str) -> Any:
    def dump(name: str) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}

    return SimpleNamespace(
        tools=[SimpleNamespace(model_dump=lambda n=n, **_: dump(n)) for n in names] or None
    )


def test_the_tools_of_a_request_are_its_own_and_those_that_it_names():
    tools = parse_tools(
        request("search"), {"tool_choice": "required", "parallel_tool_calls": False}, ["pause"], TOOLS
    )
    assert [tool.name for tool in tools.client] == ["search"]
    assert [tool.name for tool in tools.operator] == ["pause"]
    assert (tools.choice, tools.parallel) == ("required", False)
    named = {"type": "function", "function": {"name": "search"}}
    assert (
        parse_tools(request("search"), {"tool_choice": named}, None, TOOLS).options["tool_choice"] == "search"
    )
    assert parse_tools(request("search"), {"tool_choice": "none"}, "all", TOOLS).options == {}
    assert parse_tools(request(), {}, None, ()).options == {}
    options = {"tools": "all", "tool_choice": "add", "mode": "auto"}
    assert [t.name for t in pop_tools(options, TOOLS).options["tools"]] == ["add", "pause"]
    assert options == {"mode": "auto"}


@pytest.mark.parametrize(
    ("names", "body", "expected"),
    [
        (["ad"], {}, "apr tools has 'ad', did you mean 'add'"),
        (3, {}, 'expected "all" or a list'),
        ([1], {}, 'expected "all" or a list'),
        (
            ["add"],
            {"tool_choice": {"type": "function", "function": {"name": "sub"}}},
            "expected one of the tools: add",
        ),
        (None, {"tool_choice": "required"}, "needs tools"),
    ],
)
def test_tools_that_are_not_there_are_refused(names: Any, body: dict[str, Any], expected: str):
    with pytest.raises(AprError, match=expected):
        parse_tools(request(), body, names, TOOLS)


def test_a_request_cannot_have_two_tools_of_one_name_or_those_of_a_server_without_any():
    with pytest.raises(AprError, match="two tools have the name 'add'"):
        parse_tools(request("add"), {}, ["add"], TOOLS)
    with pytest.raises(AprError, match="start it with --apr-tools"):
        select_tools("all", ())
    assert not ToolSources()
