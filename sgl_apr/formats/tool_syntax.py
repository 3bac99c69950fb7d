"""Tools that a model can call, and the calls in what it wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.formats.call_formats import CallFormat, call_format, supported_parsers
from sgl_apr.formats.call_parser import CallParser

MAX_TOOLS = 128
MAX_SCHEMA_CHARS = 20_000
TOOL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
NO_PARAMETERS = '{"type":"object","properties":{}}'


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A tool as a model knows it.

    Attributes:
        name: Its name.
        description: What it does.
        parameters: The JSON schema of its arguments, as JSON text.
    """

    name: str
    description: str = ""
    parameters: str = NO_PARAMETERS

    @classmethod
    def from_schema(
        cls, name: str, description: str = "", parameters: Mapping[str, Any] | None = None
    ) -> ToolDefinition:
        """Make a definition whose schema is a mapping. None stands for a tool without parameters."""
        if parameters is None:
            return cls(name, description)
        try:
            schema = json.dumps(parameters, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AprError(f"the parameters of tool {name!r} are not JSON: {error}") from None
        return cls(name, description, schema)

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of its arguments."""
        schema: dict[str, Any] = json.loads(self.parameters)
        return schema

    def as_openai(self) -> dict[str, Any]:
        """Return the tool as an entry of `tools` in OpenAI's API."""
        function = {"name": self.name, "description": self.description, "parameters": self.schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class DecodedCall:
    """A call in a text.

    Attributes:
        name: The name of the tool. A model without a mask can write one that does not exist.
        arguments: The arguments, the text of a JSON object.
        start: Where the call begins in the text, in characters.
        end: Where it ends.
    """

    name: str
    arguments: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ToolText:
    """The calls with which a text ends.

    Attributes:
        calls: The calls, in order.
        start: Where the first one begins, its section included; the length of the text if there is none.
        complete: Whether the last call is complete. If not, the text was cut inside calls, or is malformed there.
    """

    calls: tuple[DecodedCall, ...]
    start: int
    complete: bool


@dataclass(frozen=True)
class ToolSyntax:
    """The tools of a request, and the form in which its model calls them. Use `tool_syntax` to make one.

    Attributes:
        parser: The tool-call parser of SGLang that reads the model's calls.
        tools: The tools.
    """

    parser: str
    tools: tuple[ToolDefinition, ...]

    @cached_property
    def form(self) -> CallFormat:
        """How the model writes a call."""
        return call_format(self.parser)

    @property
    def allows_parallel(self) -> bool:
        """Whether the model can write several calls at once."""
        return self.form.parallel

    @property
    def trigger(self) -> str:
        """The text with which calls begin."""
        return self.form.trigger

    def parse(self, text: str) -> ToolText:
        """Return the calls with which a text ends. It takes time in proportion to the length of the text.

        Args:
            text: What a model wrote.
        """
        start, calls, complete = self._parser.parse(text)
        return ToolText(tuple(DecodedCall(*call) for call in calls), start, complete)

    def definition(self, name: str) -> ToolDefinition | None:
        """Return the tool of a name; None if there is none."""
        return self._definitions.get(name)

    @cached_property
    def _definitions(self) -> dict[str, ToolDefinition]:
        return {tool.name: tool for tool in self.tools}

    @cached_property
    def _parser(self) -> CallParser:
        return CallParser(self.form, {tool.name: tool.schema for tool in self.tools})


def tool_syntax(parser: str, tools: Iterable[ToolDefinition]) -> ToolSyntax:
    """Return the syntax of some tools for a family of models.

    Args:
        parser: A name that `--tool-call-parser` of SGLang accepts. `supported_parsers` lists those that work here.
        tools: The tools.

    Raises:
        UnsupportedEngine: The parser is not supported, or SGLang is not installed.
        AprError: A tool has a name or a schema that cannot be used.
    """
    definitions = tuple(tools)
    if not 1 <= len(definitions) <= MAX_TOOLS:
        raise AprError(f"{len(definitions)} tools, expected 1 to {MAX_TOOLS}")
    names: set[str] = set()
    for tool in definitions:
        _check_definition(tool)
        if tool.name in names:
            raise AprError(f"two tools have the name {tool.name!r}, expected different names")
        names.add(tool.name)
    call_format(parser)
    return ToolSyntax(parser, definitions)


def _check_definition(tool: ToolDefinition) -> None:
    if not TOOL_NAME.fullmatch(tool.name):
        raise AprError(
            f"the tool {tool.name!r:.80}: expected a name of at most 64 letters, digits, '_', '-' and '.'"
        )
    if len(tool.parameters) > MAX_SCHEMA_CHARS:
        raise AprError(
            f"tool {tool.name!r}: its schema has {len(tool.parameters)} characters, expected at most {MAX_SCHEMA_CHARS}"
        )
    try:
        schema = json.loads(tool.parameters)
    except (ValueError, RecursionError) as error:
        raise AprError(f"tool {tool.name!r}: its parameters are not JSON: {error}") from None
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise AprError(f"tool {tool.name!r}: its parameters are not the JSON schema of an object")


__all__ = ["DecodedCall", "ToolDefinition", "ToolSyntax", "ToolText", "supported_parsers", "tool_syntax"]
