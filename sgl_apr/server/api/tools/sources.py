"""Loads the operator's tools, which `--apr-tools` names: functions of Python modules, and MCP servers of a file."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.errors import AprError, LaunchError
from sgl_apr.runtime.tools.tool import Tool, make_tools
from sgl_apr.runtime.value_checks import shorten, unknown_name

PYTHON_NAME = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_][\w.]*)(?P<call>\(\))?")
MCP_SUFFIX = ".json"
MCP_KEYS = ("command", "args", "env", "cwd", "url", "headers", "type", "tools", "prefix")
MCP_TYPES = ("stdio", "http", "streamable-http", "streamable_http")
EXPECTED = f"expected module:name, module:name() or a file *{MCP_SUFFIX} with mcpServers"


@dataclass(frozen=True, slots=True)
class ToolSources:
    """What the operator's tools come from.

    Attributes:
        tools: The tools of Python modules.
        mcp_servers: The arguments of `mcp_tools` for each server, by its name in the file.
    """

    tools: tuple[Tool, ...] = ()
    mcp_servers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tools or self.mcp_servers)


def tool_source(text: str) -> str:
    """Return the value of `--apr-tools` if it has the right form. Nothing is imported."""
    if not (text.endswith(MCP_SUFFIX) or PYTHON_NAME.fullmatch(text)):
        raise argparse.ArgumentTypeError(f"{shorten(text)}, {EXPECTED}")
    return text


def load_tool_sources(texts: Sequence[str]) -> ToolSources:
    """Import the modules and read the files.

    Args:
        texts: The values of `--apr-tools`.

    Raises:
        LaunchError: A module cannot be imported, a name is not in it or is no tool, a file is not valid, or two tools or
            servers have one name.
    """
    tools: list[Tool] = []
    servers: dict[str, Mapping[str, Any]] = {}
    for text in texts:
        try:
            if text.endswith(MCP_SUFFIX):
                read = read_mcp_file(text)
                if twice := sorted(read.keys() & servers.keys()):
                    raise AprError(f"an MCP server {twice[0]!r} is in two files, expected different names")
                servers |= read
            else:
                tools += load_tools(text)
            make_tools(tools)
        except AprError as error:
            raise LaunchError(f"argument --apr-tools: {text}: {error}") from error
    return ToolSources(tuple(tools), servers)


def load_tools(text: str) -> tuple[Tool, ...]:
    """Return the tools of `module:name`: a function, a `Tool`, or a list of them. With `()`, what the function returns.

    Modules of the working directory can be named.

    Raises:
        AprError: The module cannot be imported, or the name is not in it, or is no tool.
    """
    parts = PYTHON_NAME.fullmatch(text)
    if parts is None:
        raise AprError(EXPECTED)
    if (directory := os.getcwd()) not in sys.path:
        sys.path.insert(0, directory)
    try:
        value: Any = importlib.import_module(parts["module"])
    except Exception as error:  # whatever a module raises
        raise AprError(f"the module cannot be imported: {_describe(error)}") from error
    for name in parts["name"].split("."):
        try:
            value = getattr(value, name)
        except AttributeError:
            raise AprError(unknown_name(name, [n for n in dir(value) if n[0] != "_"], "name ")) from None
    if parts["call"]:
        try:
            value = value()
        except Exception as error:
            raise AprError(f"the function failed: {_describe(error)}") from error
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if not listed:
        raise AprError("the list is empty, expected tools")
    tools = make_tools(listed)
    for tool in tools:
        if tool.function is None:
            raise AprError(f"the tool {tool.name!r} has no function, expected one that this server can run")
    return tools


def read_mcp_file(path: str) -> dict[str, dict[str, Any]]:
    """Return the arguments of `mcp_tools` for each server in a file of the form that MCP clients share.

    `{"mcpServers": {"time": {"command": "mcp-server-time", "args": [], "env": {}}, "docs": {"url": "http://..."}}}`, where
    `tools` is a list of the tools to offer, and `prefix` is put before their names.

    Raises:
        AprError: The file cannot be read, or is not of this form.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise AprError(f"the file cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise AprError(f"the file is no JSON: {error}") from None
    servers = content.get("mcpServers") if isinstance(content, dict) else None
    if not isinstance(servers, dict) or not servers:
        raise AprError('the file has no servers, expected {"mcpServers": {NAME: {"command": ...}}}')
    return {name: _mcp_arguments(name, server) for name, server in servers.items()}


def _mcp_arguments(name: str, server: Any) -> dict[str, Any]:
    where = f"mcpServers {name}"
    if not isinstance(server, dict):
        raise AprError(f"{where} is {shorten(server)}, expected an object")
    for key in server:
        if key not in MCP_KEYS:
            raise AprError(unknown_name(key, MCP_KEYS, f"key of {where} "))
    if (kind := server.get("type", "stdio")) not in MCP_TYPES:
        raise AprError(f"{where}: type={shorten(kind)}, expected stdio or http")
    arguments = {
        key: server[key] for key in ("env", "cwd", "url", "headers", "prefix") if server.get(key) is not None
    }
    if "command" in server:
        command, rest = server["command"], server.get("args") or []
        if not (
            isinstance(command, str) and isinstance(rest, list) and all(isinstance(a, str) for a in rest)
        ):
            raise AprError(f"{where}: expected a command that is text, and args that are a list of texts")
        arguments["command"] = [command, *rest]
    if server.get("tools") is not None:
        arguments["include"] = server["tools"]
    return arguments


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
