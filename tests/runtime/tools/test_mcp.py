"""Tools of MCP servers: what their results become, and servers that fail in every way."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import psutil
import pytest
import uvloop

from sgl_apr.errors import AprError, McpError, MissingExtra
from sgl_apr.runtime.tools import mcp_connection
from sgl_apr.runtime.tools.mcp import mcp_tools
from tests.support.paths import ROOT

RAW = ROOT / "tests/support/raw_mcp_server.py"


def raw(*arguments: str) -> list[str]:
    return [sys.executable, "-S", "-E", str(RAW), *arguments]


@asynccontextmanager
async def raw_tools(*arguments: str, **options):
    async with mcp_tools(command=raw(*arguments), **options) as tools:
        yield {tool.name: tool.function for tool in tools}


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


def test_results_are_text_and_what_is_not_is_named():
    async def main():
        async with raw_tools() as tools:
            assert await tools["ok"]() == "done"
            assert await tools["structured"]() == '{"degrees": 21}'
            image = await tools["image"]()
            assert image == "[image (image/png) was left out: only text can be read]\ninside\n[b: file:///b]"
            with pytest.raises(McpError, match=r"^no such city$"):
                await tools["fails"]()
            assert await tools["junk"]() == "after junk"
            assert "child_pid" in tools  # OpenAI's names have no dots

    asyncio.run(main())


def test_a_server_that_ends_fails_the_calls_and_is_started_again(monkeypatch, caplog):
    monkeypatch.setattr(mcp_connection, "RESTART_INTERVAL_S", 0.3)

    async def main():
        async with raw_tools() as tools:
            first = await tools["pid"]()
            waiting = asyncio.create_task(tools["hangs"]())
            await asyncio.sleep(0)
            with pytest.raises(McpError, match="the server ended"):
                await tools["dies"]()
            with pytest.raises(McpError, match="the server ended"):
                await waiting
            with pytest.raises(McpError, match="the server ended; it wrote: out of luck"):
                await tools["ok"]()  # too early to start it again
            await asyncio.sleep(0.3)
            assert await tools["pid"]() != first

    caplog.set_level(logging.INFO, "sgl_apr.runtime.tools")
    asyncio.run(main())
    assert "out of luck" in caplog.text


def test_a_start_that_fails_or_takes_longer_than_a_call_is_followed_by_another(monkeypatch, tmp_path):
    monkeypatch.setattr(mcp_connection, "RESTART_INTERVAL_S", 0.0)
    server = tmp_path / "server.py"
    server.write_text(code := RAW.read_text())

    async def main():
        async with mcp_tools(command=[sys.executable, "-S", "-E", str(server)]) as listed:
            tools = {tool.name: tool.function for tool in listed}
            server.write_text("raise SystemExit(3)")
            for name in ("dies", "ok", "ok"):
                with pytest.raises(McpError, match="the server ended"):
                    await tools[name]()
                await asyncio.sleep(0.1)
            server.write_text(code)
            assert await tools["ok"]() == "done"
            with pytest.raises(McpError):
                await tools["dies"]()
            await asyncio.sleep(0.2)
            call = asyncio.create_task(tools["ok"]())
            await asyncio.sleep(0.001)
            call.cancel()  # its time is up, and the server goes on starting
            assert await tools["ok"]() == "done"

    asyncio.run(main())


def test_calls_run_at_once_and_a_call_that_hangs_can_be_cancelled():
    async def main():
        async with raw_tools() as tools:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(tools["hangs"](), 0.05)
            hanging = [asyncio.create_task(tools["hangs"]()) for _ in range(50)]
            assert await tools["ok"]() == "done"
        with pytest.raises(McpError):  # leaving the block ends them
            await asyncio.wait_for(hanging[0], 1)
        await asyncio.gather(*hanging, return_exceptions=True)
        with pytest.raises(McpError, match="closed"):
            await tools["ok"]()

    asyncio.run(main())


def test_a_message_without_end_ends_the_connection(monkeypatch):
    monkeypatch.setattr("sgl_apr.runtime.tools.mcp_process.MAX_MESSAGE_BYTES", 2**20)
    monkeypatch.setattr("sgl_apr.runtime.tools.mcp_process.EXIT_TIMEOUT_S", 0.1)

    async def main():
        async with raw_tools() as tools:
            with pytest.raises(McpError, match="more than 1048576 bytes"):
                await tools["huge"]()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (raw("deaf"), "did not start within 0.5 seconds"),
        (
            ["/no/such/program"],
            "No such file: '/no/such/program', expected the path of a program, or its name",
        ),
        (
            [sys.executable, "-S", "-c", "import sys; sys.exit('no licence')"],
            "the server ended; it wrote: no licence",
        ),
        ([sys.executable, "-S", "-c", "print('hello')"], "the server ended"),
        (raw("endless"), "lists more than"),
        (raw("bad_schema"), "tool ok: parameters are no JSON schema"),
    ],
    ids=["deaf", "missing", "fails", "no_server", "endless", "bad_schema"],
)
def test_a_server_that_does_not_start_is_an_error(command, expected, monkeypatch):
    monkeypatch.setattr("sgl_apr.runtime.tools.mcp_process.EXIT_TIMEOUT_S", 0.1)

    async def main():
        timeout = 0.5 if "deaf" in command else 20.0
        async with mcp_tools(command=command, start_timeout=timeout):
            pytest.fail("it started")

    with pytest.raises(McpError, match=expected):
        asyncio.run(main())


@pytest.mark.parametrize(("program", "cwd"), [("/no/such/file", None), (sys.executable, "/no/such/file")])
def test_what_is_missing_is_named_under_uvloop(program: str, cwd: str | None):
    """Servers run under it, and its error does not say which file is missing."""

    async def main():
        async with mcp_tools(command=[program], cwd=cwd):
            pytest.fail("it started")

    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        pytest.raises(McpError, match="No such file: '/no/such/file'"),
    ):
        runner.run(main())


def test_no_process_of_a_server_survives(monkeypatch):
    monkeypatch.setattr("sgl_apr.runtime.tools.mcp_process.EXIT_TIMEOUT_S", 0.1)

    async def leave() -> list[int]:
        async with raw_tools("stubborn") as tools:
            return [int(await tools[name]()) for name in ("pid", "child_pid")]

    async def cancelled() -> list[int]:
        started: list[int] = []

        async def hold() -> None:
            async with raw_tools("stubborn") as tools:
                started.extend([int(await tools[name]()) for name in ("pid", "child_pid")])
                await asyncio.sleep(1000)

        task = asyncio.create_task(hold())
        while len(started) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        return started  # the loop ends at once, and cancels all that is left

    for main in (leave, cancelled):
        pids = asyncio.run(main())
        deadline = time.monotonic() + 5
        while any(is_alive(pid) for pid in pids):
            assert time.monotonic() < deadline, main
            time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "either command"),
        ({"command": ["a"], "url": "http://a"}, "either command"),
        ({"command": []}, "expected a program"),
        ({"command": "'a"}, "expected a program"),
        ({"url": "ftp://a"}, "expected http://"),
        ({"url": "http://a", "env": {}}, "belong to a command"),
        ({"command": ["a"], "headers": {}}, "belong to a url"),
        ({"command": ["a"], "env": {"A": 1}}, "expected text"),
    ],
)
def test_arguments_are_checked(arguments, expected):
    async def main():
        async with mcp_tools(**arguments):
            pytest.fail("it started")

    with pytest.raises(AprError, match=expected):
        asyncio.run(main())


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("sgl_apr.errors.find_spec", lambda name: None)

    async def main():
        async with mcp_tools(command=["a"]):
            pytest.fail("it started")

    with pytest.raises(MissingExtra, match=r"pip install .*mcp.* \(the extra mcp\)"):
        asyncio.run(main())


def test_a_stock_server_over_stdio():
    async def main():
        command = [str(Path(sys.executable).with_name("mcp-server-time"))]
        async with mcp_tools(command=command, prefix="time-", include=["convert_time"]) as tools:
            (tool,) = tools
            assert tool.name == "time-convert_time"
            assert tool.parameters["required"] == ["source_timezone", "time", "target_timezone"]
            result = await tool.function(
                source_timezone="Asia/Tokyo", time="12:00", target_timezone="Asia/Kolkata"
            )
            assert '"time_difference": "-3.5h"' in result
            with pytest.raises(McpError, match="Invalid time format"):
                await tool.function(source_timezone="Asia/Tokyo", time="noon", target_timezone="Asia/Kolkata")

    asyncio.run(main())


@contextmanager
def serving(port: int = 0) -> Iterator[str]:
    """A server of the package `mcp` over streamable HTTP, in a thread."""
    import uvicorn
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("test")

    @server.tool()
    async def sleep(seconds: float) -> str:
        "Sleep."
        await asyncio.sleep(seconds)
        return f"slept {seconds}"

    @server.tool()
    async def point(x: int) -> dict[str, int]:
        "Return a point."
        return {"x": x}

    @server.tool()
    async def big(size: int) -> str:
        "Return much."
        return "x" * size

    config = uvicorn.Config(server.streamable_http_app(), port=port, log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/mcp"
    running.should_exit = running.force_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def http_server() -> Iterator[str]:
    with serving() as url:
        yield url


def test_a_server_over_http(http_server):
    async def main():
        async with mcp_tools(url=http_server) as listed:
            tools = {tool.name: tool.function for tool in listed}
            start = time.monotonic()
            results = await asyncio.gather(*(tools["sleep"](seconds=0.2) for _ in range(20)))
            assert results == ["slept 0.2"] * 20
            assert time.monotonic() - start < 2
            assert '"x": 3' in await tools["point"](x=3)
            assert len(await tools["big"](size=2**20)) == 2**20
            with pytest.raises(McpError):
                await tools["big"](size=2**24 + 1)
            assert await tools["sleep"](seconds=0) == "slept 0.0"

    asyncio.run(main())


def test_an_http_server_that_is_not_there_is_an_error():
    async def main(url):
        async with mcp_tools(url=url):
            pytest.fail("it started")

    with pytest.raises(McpError, match=r"http://127\.0\.0\.1:1/mcp: .*attempts failed|Connect"):
        asyncio.run(main("http://user:secret@127.0.0.1:1/mcp?key=secret"))


@pytest.mark.slow
def test_an_http_server_that_is_started_again_is_found_again(monkeypatch):
    monkeypatch.setattr(mcp_connection, "RESTART_INTERVAL_S", 0.2)

    async def main():
        server = ExitStack()
        url = server.enter_context(serving())
        async with mcp_tools(url=url, include=["sleep"]) as (tool,):
            call = asyncio.create_task(tool.function(seconds=30))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(server.close)
            for waiting in (call, tool.function(seconds=0)):
                with pytest.raises(McpError):
                    await asyncio.wait_for(waiting, 10)
            server.enter_context(serving(int(url.split(":")[2].removesuffix("/mcp"))))
            await asyncio.sleep(0.2)
            try:
                assert await tool.function(seconds=0) == "slept 0.0"
            except McpError:  # the session of the server that ended
                await asyncio.sleep(0.2)
                assert await tool.function(seconds=0) == "slept 0.0"
            await asyncio.to_thread(server.close)

    asyncio.run(main())
