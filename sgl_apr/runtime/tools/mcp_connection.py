"""A connection to one MCP server: starting it, calling its tools, starting it again if it has ended, closing it."""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from sgl_apr.errors import AprError, McpError
from sgl_apr.runtime.tools.mcp_process import ServerState

T = TypeVar("T")
MAX_TOOLS = 1000
MAX_LIST_PAGES = 100
RESTART_INTERVAL_S = 5.0  # a server that has ended is started again at most this often
CLOSE_TIMEOUT_S = 10.0
SESSION_TERMINATED = "Session terminated"  # the message of the package `mcp` for status 404
log = logging.getLogger(__name__)


class McpConnection:
    """Holds the session with one server in a task of its own.

    The session's task groups are entered and left in that task, so calls may come from any task, and a server that ends
    does not cancel who uses it. If the server has ended, the next call starts it again.

    Args:
        name: Names the server in messages.
        connect: Makes the transport: streams of messages from the server and to it. It sets what becomes of the server.
        start_timeout: Seconds for the start, until the tools are listed.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[ServerState], AbstractAsyncContextManager[Any]],
        start_timeout: float,
    ) -> None:
        self._name = name
        self._connect = connect
        self._state = ServerState()
        self._start_timeout = start_timeout
        self._session: Any = None
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._started_at = 0.0
        self._restarting: asyncio.Task[list[Any]] | None = None
        self._is_closed = False

    async def start(self) -> list[Any]:
        """Connect, and return the server's tools.

        Raises:
            McpError: The server does not start, or not in time, or sends something that is not valid.
        """
        await asyncio.to_thread(importlib.import_module, "mcp")  # takes a second
        self._state, self._stop, self._started_at = ServerState(), asyncio.Event(), time.monotonic()
        ready: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(ready, self._stop, self._state))
        try:
            async with asyncio.timeout(self._start_timeout):
                return await ready
        except TimeoutError:
            self._task.cancel()
            await self._end_session()
            raise self._error(f"it did not start within {self._start_timeout:g} seconds") from None
        except BaseException:
            self._task.cancel()
            await self._end_session()
            raise

    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Call a tool, and return the result as the package `mcp` has it.

        Cancelling the call tells the server.

        Raises:
            McpError: The server ended or failed, or its result is not valid.
        """
        if self._is_closed or self._task is None:
            raise self._error("the connection is closed")
        if self._restarting or self._stop.is_set() or self._task.done():
            await self._restart()
        return await self._until_end(self._session.call_tool(name, arguments))

    async def close(self) -> None:
        """End the session and the server. It waits until the server's process has ended, if the caller lets it."""
        self._is_closed = True
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        await self._end_session()

    async def _restart(self) -> None:
        """Start the server again, for all calls that wait for it. A call that is cancelled does not end the start."""
        if self._restarting is None:
            if time.monotonic() - self._started_at < RESTART_INTERVAL_S:
                raise self._error(self._state.failure or "the server ended")
            log.warning("%s", self._error("the server ended; it is started again"))
            self._restarting = asyncio.create_task(self.start())
            self._restarting.add_done_callback(self._forget_restart)
        await asyncio.shield(self._restarting)

    def _forget_restart(self, task: asyncio.Task[list[Any]]) -> None:
        self._restarting = None
        if not task.cancelled():
            task.exception()  # the calls that waited for it have raised it

    async def _end_session(self) -> None:
        self._stop.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=CLOSE_TIMEOUT_S)
            self._task.cancel()  # nothing to cancel unless it hangs
            await asyncio.wait({self._task}, timeout=1)

    async def _run(self, ready: asyncio.Future[list[Any]], stop: asyncio.Event, state: ServerState) -> None:
        """The task that holds the session: connect, wait until the end, disconnect."""
        from mcp import Client

        ends: list[asyncio.Task[Any]] = []
        try:
            async with Client(self._connect(state), cache=None) as client:
                self._session = client.session
                tools = await _list_tools(client)
                if not ready.done():
                    ready.set_result(tools)
                ends = [asyncio.create_task(event.wait()) for event in (stop, state.ended)]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        except (Exception, BaseExceptionGroup) as error:
            state.end(_describe(error))
        finally:
            for end in ends:
                end.cancel()
            if not ready.done():
                ready.set_exception(self._error(state.failure or "the start was cancelled"))

    async def _until_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`, or fail as soon as the connection has ended."""
        assert self._task is not None
        call, state = asyncio.create_task(work), self._state
        try:
            await asyncio.wait({call, self._task}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise self._error(state.failure or "the server ended")
            return call.result()
        except McpError:
            raise
        except Exception as error:
            if SESSION_TERMINATED in str(
                error
            ):  # an HTTP server that was started again does not know the session
                state.end("the server ended the session")
            raise self._error(state.failure or _describe(error)) from error
        finally:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    def _error(self, message: str) -> McpError:
        lines = (
            f"; it wrote: {' | '.join(self._state.lines)}"
            if self._state.failure and self._state.lines
            else ""
        )
        return McpError(f"MCP server {self._name}: {message}{lines}")


async def _list_tools(client: Any) -> list[Any]:
    """Return all tools of a server, page by page."""
    tools: list[Any] = []
    cursor: str | None = None
    for _ in range(MAX_LIST_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None or len(tools) > MAX_TOOLS:
            break
    if cursor is not None or len(tools) > MAX_TOOLS:
        raise AprError(f"it lists more than {MAX_TOOLS} tools")
    return tools


def _describe(error: BaseException) -> str:
    """Return the message of the first error that is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, FileNotFoundError):
        return (
            f"No such file: {error.filename!r}, expected the path of a program, or its name if it is on PATH"
        )
    text = " ".join(str(error).splitlines()[:3]) or type(error).__name__
    return text if isinstance(error, AprError) else f"{type(error).__name__}: {text}"[:500]
