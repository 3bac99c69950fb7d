"""Tools: a name, a description, a JSON schema of the arguments, and the function that runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.runtime.tools.function_schema import (
    arguments_adapter,
    arguments_schema,
    function_name,
    read_docstring,
)
from sgl_apr.runtime.value_checks import check_type, shorten, unknown_name

TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MAX_SCHEMA_DEPTH = 64
ANY_OBJECT: Mapping[str, Any] = {"type": "object", "properties": {}}
FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


@dataclass(frozen=True)
class Tool:
    """A function that a model may call by its name, with arguments that fit a JSON schema.

    Attributes:
        name: 1 to 64 letters, digits, `_` and `-`.
        description: What the model reads about it.
        parameters: The JSON schema of the arguments, which are one object. None for no arguments.
        function: Receives the arguments by keyword, and returns text, or what JSON can express. It may be async. One that
            is not runs in a thread of its own. None for a tool that the client runs (`ReasonOptions.run_tool`).

    Examples:
        >>> def add(a: int, b: int = 1) -> int:
        ...     "Add two numbers."
        ...     return a + b
        >>> tool = Tool.from_function(add)
        >>> tool.name, tool.description, tool.parameters["required"]
        ('add', 'Add two numbers.', ['a'])
        >>> tool.check_arguments('{"a": 2}')
        {'a': 2, 'b': 1}
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    function: Callable[..., Any] | None = None
    adapter: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and TOOL_NAME.fullmatch(self.name)):
            raise AprError(
                f"a tool has the name {shorten(self.name)}, expected 1 to 64 letters, digits, _ and - as in OpenAI's API"
            )
        check_type(f"tool {self.name}: description", self.description, str)
        if self.function is not None and not callable(self.function):
            raise AprError(f"tool {self.name}: function={shorten(self.function)}, expected a function")
        parameters = ANY_OBJECT if self.parameters is None else self.parameters
        object.__setattr__(self, "parameters", _checked_schema(self.name, parameters))

    @classmethod
    def from_function(
        cls, function: Callable[..., Any], *, name: str | None = None, description: str | None = None
    ) -> Tool:
        """Make a tool of a typed function, a method, or another callable. Pydantic makes the schema of its signature.

        Args:
            function: The function. Its docstring is the description, without the list of arguments, which describes the
                parameters. Types may have pydantic's constraints, and parameters with a default may be left out.
            name: The name of the tool, by default that of the function.
            description: What the model reads, by default from the docstring.

        Raises:
            AprError: It is no function, or its arguments have no JSON schema.
        """
        if not callable(function):
            raise AprError(f"a tool is {shorten(function)}, expected a function or a Tool")
        name = function_name(function) if name is None else name
        text, descriptions = read_docstring(function)
        adapter = arguments_adapter(function, name)
        schema = arguments_schema(adapter, descriptions, name)
        return cls(name, text if description is None else description, schema, function, adapter)

    @classmethod
    def from_openai(cls, tool: Mapping[str, Any], function: Callable[..., Any] | None = None) -> Tool:
        """Make a tool of one in the form of OpenAI's API, of chat completions or of responses.

        Args:
            tool: An object such as `{"type": "function", "function": {"name": ..., "parameters": ...}}`.
            function: What runs. None for a tool that the client runs.

        Raises:
            AprError: It is no such object, or is no function.
        """
        expected = (
            'expected {"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
        )
        if not isinstance(tool, Mapping):
            raise AprError(f"a tool is {shorten(tool)}, {expected}")
        if tool.get("type", "function") != "function":
            raise AprError(f"a tool has the type {shorten(tool['type'])}, {expected}")
        nested = tool.get("function")
        fields = nested if nested is not None else {name: tool[name] for name in tool if name != "type"}
        if not isinstance(fields, Mapping) or "name" not in fields:
            raise AprError(f"a tool is {shorten(dict(tool))}, {expected}")
        for name in fields:
            if name not in FUNCTION_FIELDS:
                raise AprError(unknown_name(name, FUNCTION_FIELDS, "field of a tool "))
        return cls(fields["name"], fields.get("description") or "", fields.get("parameters"), function)

    def to_openai(self) -> dict[str, Any]:
        """Return the tool in the form of OpenAI's chat completions, as chat templates read it."""
        function = {"name": self.name, "description": self.description, "parameters": self.schema}
        return {"type": "function", "function": function}

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the arguments."""
        return dict(self.parameters or ANY_OBJECT)

    def check_arguments(self, arguments: str) -> dict[str, Any]:
        """Return the keyword arguments of the function for the JSON of a call.

        Args:
            arguments: The text of a JSON object.

        Raises:
            AprError: It is no JSON object, or does not fit the schema. The message is for the model.
        """
        try:
            values = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise AprError(f"the arguments are no JSON: {error}") from None
        if not isinstance(values, dict):
            raise AprError(f"the arguments are {shorten(values)}, expected a JSON object")
        if self.adapter is not None:
            return self._validate_by_type(arguments or "{}")
        self._validate_by_schema(values)
        return values

    def _validate_by_type(self, arguments: str) -> dict[str, Any]:
        from pydantic import ValidationError

        try:
            values: dict[str, Any] = self.adapter.validate_json(arguments)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)
            ]
            raise AprError(f"the arguments do not fit: {'; '.join(problems[:8])}") from None
        return values

    def _validate_by_schema(self, values: dict[str, Any]) -> None:
        from jsonschema.validators import validator_for
        from referencing import Registry

        # A registry of its own, so that no reference is fetched.
        validator = validator_for(self.schema)(self.schema, registry=Registry())
        try:
            problems = [
                f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(values)
            ]
        except Exception as error:  # a reference to nowhere, or a pattern that Python does not have
            raise AprError(f"the schema of the tool cannot be applied: {error}") from None
        if problems:
            raise AprError(f"the arguments do not fit: {'; '.join(problems[:8])}")


def make_tools(tools: Any) -> tuple[Tool, ...]:
    """Return tools from tools and functions.

    Raises:
        AprError: Something is neither, or two have one name.
    """
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise AprError(f"tools={shorten(tools)}, expected a list of functions and Tools")
    made = tuple(tool if isinstance(tool, Tool) else Tool.from_function(tool) for tool in tools)
    names = [tool.name for tool in made]
    if twice := [name for name in names if names.count(name) > 1]:
        raise AprError(f"two tools have the name {twice[0]!r}, expected different names")
    return made


def _checked_schema(name: str, schema: Any) -> dict[str, Any]:
    """A copy of a JSON schema of arguments.

    Raises:
        AprError: It is no schema of an object, or refers to something outside of it.
    """
    where = f"tool {name}: parameters"
    if not isinstance(schema, Mapping):
        raise AprError(f"{where}={shorten(schema)}, expected a JSON schema")
    if schema.get("type", "object") != "object":
        raise AprError(f"{where} have the type {shorten(schema['type'])}, expected an object")
    copied = _copy_json(schema, where)
    assert isinstance(copied, dict)
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    try:
        validator_for(copied).check_schema(copied)
    except SchemaError as error:
        raise AprError(f"{where} are no JSON schema: {error.json_path}: {error.message[:200]}") from None
    return {"type": "object", **copied}


def _copy_json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of a value that JSON can express."""
    if depth > MAX_SCHEMA_DEPTH:
        raise AprError(f"{where} nest more than {MAX_SCHEMA_DEPTH} deep")
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            raise AprError(f"{where} have a key that is no text")
        reference = value.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise AprError(f"{where} refer to {shorten(reference)}, expected a reference within the schema")
        return {key: _copy_json(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy_json(item, where, depth + 1) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise AprError(f"{where} have the value {shorten(value)}, which JSON cannot express")
