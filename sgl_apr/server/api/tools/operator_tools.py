"""The operator's tools while the server runs: their MCP servers, and an event loop of their own."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from sgl_apr.errors import AprError, LaunchError
from sgl_apr.runtime.tools.mcp import mcp_tools
from sgl_apr.runtime.tools.tool import Tool, make_tools
from sgl_apr.server.api.tools.request import select_tools
from sgl_apr.server.api.tools.sources import ToolSources

T = TypeVar("T")
STOP_TIMEOUT_S = 15.0


class OperatorTools:
    """Runs the async tools and the MCP servers of the operator in a thread with an event loop of its own.

    So a tool that blocks its event loop does not block the server. Tools that are no async functions run in other threads.

    Args:
        sources: The tools and the MCP servers.

    Attributes:
        tools: The tools. Those of MCP servers are there once it was started.
    """

    def __init__(self, sources: ToolSources) -> None:
        self._sources = sources
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stack = AsyncExitStack()
        self._thread: threading.Thread | None = None
        self.tools: tuple[Tool, ...] = tuple(map(self._in_own_loop, sources.tools))

    async def start(self) -> None:
        """Start the thread and the MCP servers.

        Raises:
            LaunchError: An MCP server does not start, or two tools have one name.
        """
        if not self._sources:
            return
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sgl-apr-tools", daemon=True)
        self._thread.start()
        try:
            tools = await self._run(self._connect())
            self.tools = make_tools([*self.tools, *map(self._in_own_loop, tools)])
        except AprError as error:
            await self.close()
            raise LaunchError(f"argument --apr-tools: {error}") from error

    async def close(self) -> None:
        """End the MCP servers and the thread."""
        if self._thread is None or self._loop is None:
            return
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._run(self._disconnect())
        except TimeoutError:
            pass  # a tool blocks the loop, and the thread ends with the process
        else:
            self._loop.call_soon_threadsafe(self._loop.stop)
            await asyncio.to_thread(self._thread.join)  # a process that forks should have no other threads
            self._loop.close()
        finally:
            self._thread = self._loop = None

    async def _connect(self) -> list[Tool]:
        tools: list[Tool] = []
        for name, arguments in self._sources.mcp_servers.items():
            try:
                tools += await self._stack.enter_async_context(mcp_tools(**arguments))
            except AprError as error:
                raise LaunchError(f"mcpServers {name}: {error}") from error
        return tools

    async def _disconnect(self) -> None:
        await self._stack.aclose()
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    def _run(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        if self._loop is None:
            work.close()
            raise AprError("the server stops")
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _in_own_loop(self, tool: Tool) -> Tool:
        """Return a tool whose async function runs in the loop of the tools."""
        function = tool.function
        if function is None or not is_async(function):
            return tool

        async def call(**arguments: Any) -> Any:
            return await self._run(function(**arguments))

        return replace(tool, function=call)


async def check_tools(sources: ToolSources, default: Any = None) -> None:
    """Start the MCP servers and list all tools, so that what is wrong is known before the model is loaded.

    Args:
        sources: The tools and the MCP servers.
        default: The option `tools` of requests that do not have it.

    Raises:
        LaunchError: An MCP server does not start, two tools have one name, or a default names none of them.
    """
    tools = OperatorTools(sources)
    if sources.mcp_servers:
        await tools.start()
    try:
        select_tools(default, tools.tools)
    except AprError as error:
        raise LaunchError(f"argument --apr-default: {error}") from error
    finally:
        await tools.close()


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether calling a function returns a coroutine."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # of an object
    )
