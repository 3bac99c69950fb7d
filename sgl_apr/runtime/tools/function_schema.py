"""What a typed Python function says about itself as a tool: its description, its JSON schema, and how it is called."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.runtime.value_checks import shorten

ARGUMENTS_HEADING = re.compile(r"^(?:Args|Arguments|Parameters):\s*$", re.MULTILINE)
ARGUMENT = re.compile(r"^(\*{0,2}\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


def arguments_adapter(function: Callable[..., Any], name: str) -> Any:
    """Return a pydantic `TypeAdapter` that turns the JSON of arguments into keyword arguments of a function.

    Args:
        function: A function, a method, or another callable.
        name: What messages call it.

    Raises:
        AprError: The function cannot be called by keyword, or pydantic does not know a type of it.
    """
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise AprError(
            f"tool {name}: {shorten(function)} has no signature, expected Tool(...) with a schema"
        ) from None
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise AprError(
                f"tool {name}: the parameter {parameter.name!r} is passed by position, "
                "expected parameters that are passed by name"
            )

    def bind_arguments(**arguments: Any) -> dict[str, Any]:
        return arguments

    bind: Any = bind_arguments
    bind.__signature__ = signature.replace(return_annotation=inspect.Signature.empty)
    try:
        bind.__annotations__ = _type_hints(function)
        bind.__annotations__.pop("return", None)
        return TypeAdapter(bind)
    except (PydanticUserError, NameError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise AprError(f"tool {name}: its arguments have no JSON schema: {reason}") from error


def arguments_schema(adapter: Any, descriptions: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return the JSON schema of the arguments of a function.

    Args:
        adapter: From `arguments_adapter`.
        descriptions: The descriptions of parameters, for those that have none of their own.
        name: What messages call the tool.

    Raises:
        AprError: A type has no JSON schema.
    """
    from pydantic.errors import PydanticInvalidForJsonSchema

    try:
        schema: dict[str, Any] = adapter.json_schema()
    except PydanticInvalidForJsonSchema as error:
        reason = str(error).partition("\n")[0]
        raise AprError(f"tool {name}: its arguments have no JSON schema: {reason}") from error
    _drop_titles(schema)
    for parameter, described in schema.get("properties", {}).items():
        if parameter in descriptions:
            described.setdefault("description", descriptions[parameter])
    schema.setdefault("properties", {})
    return schema


def read_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return the description in a docstring, and those of the parameters in its Google-style list of arguments.

    Examples:
        >>> def search(query: str) -> str:
        ...     '''Search the library.
        ...
        ...     Args:
        ...         query: What to look for,
        ...             in a few words.
        ...     '''
        >>> read_docstring(search)
        ('Search the library.', {'query': 'What to look for, in a few words.'})
    """
    documented = _function_of(function)
    text = inspect.getdoc(documented) or ""
    if not (heading := ARGUMENTS_HEADING.search(text)):
        return text.strip(), {}
    descriptions, current = dict[str, str](), ""
    for line in text[heading.end() :].splitlines()[1:]:
        indent = len(line) - len(line.lstrip())
        if line.strip() and not indent:  # the next section
            break
        if found := ARGUMENT.match(line.strip()) if indent <= 4 else None:
            current = found[1].lstrip("*")
            descriptions[current] = found[2]
        elif current and line.strip():
            descriptions[current] = f"{descriptions[current]} {line.strip()}".strip()
    return text[: heading.start()].strip(), descriptions


def function_name(function: Callable[..., Any]) -> str:
    """Return the name of a function, or of the class of another callable."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", "") or type(function).__name__


def _function_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the docstring: that of a partial, or the `__call__` of an object."""
    while isinstance(function, partial):
        function = function.func
    if inspect.isroutine(function) or inspect.isclass(function):
        return function
    call: Callable[..., Any] = type(function).__call__
    return call if call.__doc__ else type(function)


def _type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of the parameters, also where they are written as text."""
    while isinstance(function, partial):
        function = function.func
    if inspect.isclass(function):
        function = function.__init__
    elif not inspect.isroutine(function):
        function = type(function).__call__
    return typing.get_type_hints(function, include_extras=True)


def _drop_titles(schema: Any) -> None:
    """Remove the titles that pydantic makes of names: they only cost tokens."""
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("title"), str):
        del schema["title"]
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            for inner in value.values():
                _drop_titles(inner)
        elif key in ("anyOf", "allOf", "oneOf", "prefixItems"):
            for inner in value:
                _drop_titles(inner)
        elif key in ("items", "additionalProperties", "not"):
            _drop_titles(value)
