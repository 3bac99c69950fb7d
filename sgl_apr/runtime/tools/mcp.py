"""Tools of servers of the Model Context Protocol (MCP), through the package `mcp`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from sgl_apr.errors import AprError, McpError, require_extra
from sgl_apr.runtime.tools.mcp_connection import McpConnection
from sgl_apr.runtime.tools.mcp_http import check_url, http_transport
from sgl_apr.runtime.tools.mcp_process import ServerState, process_transport
from sgl_apr.runtime.tools.tool import Tool, make_tools
from sgl_apr.runtime.value_checks import check_type, shorten

NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_-]")
MAX_NAME = 64


@asynccontextmanager
async def mcp_tools(
    *,
    command: Sequence[str] | str | None = None,
    url: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    headers: Mapping[str, str] | None = None,
    prefix: str = "",
    include: Collection[str] | None = None,
    start_timeout: float = 30.0,
) -> AsyncIterator[list[Tool]]:
    """Connect to a server of the Model Context Protocol, and yield its tools.

    The tools can be called until the block is left, from any task, several at once. What the server returns as text or as
    structured content becomes the result. What a model cannot read, such as an image, is replaced by a note. If the server
    ends, calls fail with a message that the model reads, and the next call starts it again.

    Args:
        command: A program to run, and its arguments. It is spoken to over its standard input and output, and ended, with
            its children, when the block is left. Its standard error goes to the log `sgl_apr.runtime.tools`.
        url: The address of a server of streamable HTTP, such as `http://127.0.0.1:8000/mcp`. Either this or `command`.
        env: Variables of the program. It gets `PATH`, `HOME` and a few others of this process, and no secrets.
        cwd: The program's working directory.
        headers: Sent with every HTTP request, for example `{"Authorization": "Bearer ..."}`.
        prefix: Put before the names of the tools, so that those of two servers differ.
        include: The names of the tools to offer, as the server has them. None for all.
        start_timeout: Seconds until the server has to have listed its tools.

    Raises:
        McpError: The server cannot be started or reached, or does not answer as the protocol wants it.
        AprError: An argument is not possible.
        MissingExtra: The package `mcp` is not installed.

    Examples:
        >>> async with apr.mcp_tools(command=["mcp-server-time"]) as tools:  # doctest: +SKIP
        ...     await apr.areason(engine, "What time is it in Oslo?", tools=tools)
    """
    require_extra("mcp", "mcp", "tools of MCP servers need the package mcp")
    connect, name = _transport(command, url, env, cwd, headers)
    connection = McpConnection(name, connect, start_timeout)
    try:
        listed = await connection.start()
        yield make_tools_of_server(name, listed, connection.call, prefix, include)
    finally:
        await connection.close()


def make_tools_of_server(
    server: str,
    listed: Sequence[Any],
    call: Callable[[str, dict[str, Any]], Coroutine[Any, Any, Any]],
    prefix: str = "",
    include: Collection[str] | None = None,
) -> list[Tool]:
    """Return the tools of a server.

    Characters of a name that OpenAI's API does not allow become `_`.

    Args:
        server: Names the server in messages.
        listed: The tools as the package `mcp` has them.
        call: Calls one by its name on the server, with arguments.
        prefix: Put before the names.
        include: The names of the tools to offer. None for all.

    Raises:
        McpError: A tool has a schema that is not possible, or `include` has a name that the server does not.
    """
    names = {tool.name for tool in listed}
    if unknown := [name for name in include or () if name not in names]:
        raise McpError(
            f"MCP server {server}: it has no tool {unknown[0]!r}, but {', '.join(sorted(names)) or 'none'}"
        )

    def function(name: str) -> Callable[..., Any]:
        async def call_tool(**arguments: Any) -> str:
            return result_text(await call(name, arguments))

        return call_tool

    try:
        tools = [
            Tool(
                NOT_IN_NAMES.sub("_", prefix + tool.name)[:MAX_NAME],
                tool.description or tool.title or "",
                tool.input_schema,
                function(tool.name),
            )
            for tool in listed
            if include is None or tool.name in include
        ]
        return list(make_tools(tools))
    except AprError as error:
        raise McpError(f"MCP server {server}: {error}") from error


def result_text(result: Any) -> str:
    """Return what a model reads as the result of a call: its text, or else its structured content as JSON.

    Args:
        result: A `CallToolResult` of the package `mcp`, or one of its other results.

    Raises:
        McpError: The server says that the call failed. The message is the text of the result.
    """
    if not hasattr(result, "content"):
        raise McpError("the tool asks its client for input, which is not possible here")
    blocks = [_block_text(block) for block in result.content]
    text = "\n".join(block for block in blocks if block)
    if not text and result.structured_content is not None:
        text = json.dumps(result.structured_content, ensure_ascii=False)
    if result.is_error:
        raise McpError(text or "the tool failed without a message")
    return text


def _block_text(block: Any) -> str:
    """Return one block of a result as text, or a note that it is left out."""
    match block.type:
        case "text":
            return str(block.text)
        case "resource_link":
            return f"[{block.name}: {block.uri}]"
        case "resource" if hasattr(block.resource, "text"):
            return str(block.resource.text)
        case "resource":
            return f"[{block.resource.uri} was left out: it is binary ({block.resource.mime_type}), and only text can be read]"
        case kind:
            return f"[{kind} ({block.mime_type}) was left out: only text can be read]"


def _transport(
    command: Any, url: Any, env: Any, cwd: Any, headers: Any
) -> tuple[Callable[[ServerState], AbstractAsyncContextManager[Any]], str]:
    """Return what connects to a server, and its name in messages."""
    if (command is None) == (url is None):
        raise AprError('mcp_tools expects either command=[...] or url="http://..."')
    if url is not None:
        if env is not None or cwd is not None:
            raise AprError("mcp_tools: env and cwd belong to a command, not to a url")
        checked = check_url(url)
        sent = _check_strings("headers", headers)
        name = urlsplit(checked)._replace(query="", fragment="").geturl()
        name = name.replace(f"{urlsplit(checked).netloc.rpartition('@')[0]}@", "")  # no password in messages
        return lambda state: http_transport(checked, sent), name
    if headers is not None:
        raise AprError("mcp_tools: headers belong to a url, not to a command")
    words = split_command(command)
    variables = _check_strings("env", env)
    return partial(process_transport, words, variables, cwd), shlex.join(words)[:80]


def split_command(command: Any) -> tuple[str, ...]:
    """Return the program and its arguments. Text is split as a shell does it; no shell runs it.

    Raises:
        AprError: It is neither text nor a list of texts, or is empty.
    """
    try:
        words = shlex.split(command) if isinstance(command, str) else list(command)
    except (TypeError, ValueError) as error:
        raise AprError(
            f"mcp command={shorten(command)}, expected a program and its arguments: {error}"
        ) from None
    if not words or not all(isinstance(word, str) and "\0" not in word for word in words) or not words[0]:
        raise AprError(f"mcp command={shorten(command)}, expected a program and its arguments")
    return tuple(words)


def _check_strings(name: str, values: Any) -> dict[str, str]:
    """Return a mapping from text to text, which may be left out."""
    strings = dict(check_type(name, {} if values is None else dict(values), dict))
    for key, value in strings.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise AprError(f"mcp {name}: {shorten(key)} has the value {shorten(value)}, expected text")
    return strings
