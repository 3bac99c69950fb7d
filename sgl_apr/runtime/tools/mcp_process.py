"""Runs an MCP server as a child process and exchanges JSON-RPC messages with it over its standard input and output."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 * 2**20  # of one message of a server
MAX_LOG_LINE = 500  # characters of a line of a server's standard error
EXIT_TIMEOUT_S = 2.0  # after its input is closed, and again after SIGTERM
INHERITED_ENV = (
    "HOME",
    "LOGNAME",
    "PATH",
    "SHELL",
    "TERM",
    "USER",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "VIRTUAL_ENV",
)


class ServerState:
    """What a server process wrote to its standard error last, and whether and why the connection to it has ended.

    Attributes:
        lines: The last lines of its standard error.
        failure: Why the connection has ended. Empty while it stands.
        ended: Set when it has.
        is_closing: Whether it is this side that ends it.
    """

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=5)
        self.failure = ""
        self.ended = asyncio.Event()
        self.is_closing = False

    def lose(self, failure: str) -> None:
        """Record that the server has ended the connection, and why."""
        if not self.is_closing:
            self.end(failure)

    def end(self, failure: str) -> None:
        """Record that the connection has ended, and why, unless it had before."""
        self.failure = self.failure or failure
        self.ended.set()


@asynccontextmanager
async def process_transport(
    command: Sequence[str], env: Mapping[str, str], cwd: str | None, state: ServerState
) -> AsyncIterator[tuple[Any, Any]]:
    """Run a server process, and yield the streams of messages from it and to it.

    The transport of the `mcp` package reads lines of any length. This one bounds them, writes what the server prints on
    its standard error to the log, and ends the process and its children in every case.

    Args:
        command: The program and its arguments.
        env: Variables in addition to `INHERITED_ENV`. The server gets no others of this process.
        cwd: Its working directory.
        state: Receives the last lines of its standard error, and why the connection ended.

    Raises:
        OSError: The program cannot be started.
    """
    import anyio

    inherited = {name: os.environ[name] for name in INHERITED_ENV if name in os.environ}
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=inherited | dict(env),
            cwd=cwd,
            start_new_session=True,
            limit=MAX_MESSAGE_BYTES,
        )
    except FileNotFoundError as error:  # that of uvloop names no file
        error.filename = error.filename or (cwd if cwd and not os.path.isdir(cwd) else command[0])
        raise
    to_session, read_stream = anyio.create_memory_object_stream[Any](0)
    write_stream, from_session = anyio.create_memory_object_stream[Any](0)
    tasks = [
        asyncio.create_task(_read_messages(process, to_session, state)),
        asyncio.create_task(_write_messages(process, from_session, to_session, state)),
        asyncio.create_task(_log_errors(process, command[0], state)),
    ]
    try:
        yield read_stream, write_stream
    finally:
        state.is_closing = True
        try:
            await _stop(process)
        finally:
            _signal_group(process, signal.SIGKILL)  # its children, or all of them if this call was cancelled
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for stream in (to_session, read_stream, write_stream, from_session):
                stream.close()
            process._transport.close()  # type: ignore[attr-defined]  # a child may hold the pipes open


async def _read_messages(process: asyncio.subprocess.Process, to_session: Any, state: ServerState) -> None:
    """Pass the messages of the server on. Closing the stream makes all waiting requests fail."""
    import anyio
    from mcp.shared.message import SessionMessage
    from mcp_types import jsonrpc_message_adapter

    assert process.stdout is not None
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        async with to_session:
            while True:
                try:
                    line = await process.stdout.readline()
                except ValueError:
                    state.lose(f"the server sent a message of more than {MAX_MESSAGE_BYTES} bytes")
                    return
                if not line:
                    state.lose("the server ended")
                    return
                try:
                    message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:
                    log.warning(
                        "an MCP server wrote a line that is no JSON-RPC message: %s", _printable(line)
                    )
                    continue
                await to_session.send(SessionMessage(message))


async def _write_messages(
    process: asyncio.subprocess.Process, from_session: Any, to_session: Any, state: ServerState
) -> None:
    """Send the messages of the session to the server."""
    assert process.stdin is not None
    try:
        async with from_session:
            async for item in from_session:
                text = item.message.model_dump_json(by_alias=True, exclude_unset=True)
                process.stdin.write(text.encode() + b"\n")
                await process.stdin.drain()
    except OSError:
        state.lose("the server does not read its input")
        to_session.close()  # so no response will come


async def _log_errors(process: asyncio.subprocess.Process, name: str, state: ServerState) -> None:
    """Write the server's standard error to the log, line by line."""
    assert process.stderr is not None
    while True:
        try:
            line = await process.stderr.readline()
        except ValueError:  # longer than the limit; the next call continues after what was read
            continue
        if not line:
            return
        if text := _printable(line):
            state.lines.append(text)
            log.info("%s: %s", os.path.basename(name), text)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End a process as the protocol wants it: close its input and wait, then SIGTERM, then SIGKILL."""
    assert process.stdin is not None
    process.stdin.close()
    for next_signal in (signal.SIGTERM, signal.SIGKILL):
        if await _has_exited(process):
            return
        _signal_group(process, next_signal)
    await _has_exited(process)


async def _has_exited(process: asyncio.subprocess.Process) -> bool:
    """Return whether the process ends in time. Unlike `wait`, it does not wait for children that hold the pipes."""
    deadline = asyncio.get_running_loop().time() + EXIT_TIMEOUT_S
    while process.returncode is None:
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send a signal to the process and its children, which are a session of their own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _printable(line: bytes) -> str:
    """Return the start of a line without control characters."""
    text = line[: 4 * MAX_LOG_LINE].decode(errors="replace").strip()
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_LOG_LINE]
