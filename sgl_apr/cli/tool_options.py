"""The arguments `--tool` and `--mcp`: tools that the model may call, from Python modules and MCP servers."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from sgl_apr.errors import AprError

if TYPE_CHECKING:
    from sgl_apr.runtime.tools.tool import Tool


def add_tool_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments about tools to a parser."""
    parser.add_argument(
        "--tool",
        dest="tools",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="a tool that the model may call: a function, a Tool or a list of them in a Python module; can be repeated",
    )
    parser.add_argument(
        "--mcp",
        dest="mcp_servers",
        action="append",
        default=[],
        metavar="COMMAND_OR_URL",
        help='the tools of an MCP server: a command such as "mcp-server-time", or the URL of one; can be repeated',
    )
    parser.add_argument(
        "--tool-choice",
        metavar="CHOICE",
        help='"auto", "none", "required" (it calls a tool before it answers; each branch of `fork` does), or the name of one '
        "(default: auto)",
    )
    parser.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        help="how the model writes calls, as --tool-call-parser of SGLang (default: the server's)",
    )


def load_tool_arguments(options: argparse.Namespace) -> list[Tool]:
    """Return the tools of `--tool`.

    Raises:
        AprError: A module cannot be imported, a name is not in it, or is no tool; or `--tool-choice` is none of the tools.
    """
    if options.tool_choice and not (options.tools or options.mcp_servers):
        raise AprError("--tool-choice is for tools, expected --tool or --mcp")
    if not options.tools:
        return []
    from sgl_apr.server.api.tools.sources import load_tools

    tools: list[Tool] = []
    for text in options.tools:
        try:
            tools += load_tools(text)
        except AprError as error:
            raise AprError(f"--tool {text}: {error}") from error
    choice, names = options.tool_choice, [tool.name for tool in tools]
    # The tools of MCP servers are not known yet.
    if choice not in (None, "auto", "none", "required", *names) and not options.mcp_servers:
        expected = ", ".join(names)
        raise AprError(f"--tool-choice {choice}, expected auto, none, required, or a tool: {expected}")
    return tools


@asynccontextmanager
async def connect_tools(options: argparse.Namespace) -> AsyncIterator[list[Tool]]:
    """Connect to the servers of `--mcp`, and yield their tools.

    Raises:
        McpError: A server does not start.
        MissingExtra: The package `mcp` is not installed.
    """
    if not options.mcp_servers:
        yield []
        return
    from sgl_apr.runtime.tools.mcp import mcp_tools

    async with AsyncExitStack() as stack:
        tools: list[Tool] = []
        for text in options.mcp_servers:
            is_url = text.startswith(("http://", "https://"))
            server = mcp_tools(url=text) if is_url else mcp_tools(command=text)
            tools += await stack.enter_async_context(server)
        yield tools
