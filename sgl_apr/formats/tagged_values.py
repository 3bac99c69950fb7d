"""Reads the parameters of a call that stand between tags, each as the type that its schema has."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from sgl_apr.formats.call_formats import ParameterTags, infer_type

MAX_NAME_CHARS = 256
_NAME = re.compile(rf'[^<>\n"]{{1,{MAX_NAME_CHARS}}}')


class TaggedReader:
    """Reads the parameters of one tool.

    Args:
        tags: How a parameter is written.
        schema: The schema of the tool's arguments.
    """

    def __init__(self, tags: ParameterTags, schema: Mapping[str, Any]) -> None:
        self.tags = tags
        parameters = parameter_schemas(schema)
        self.types = {name: value_type(parameter) for name, parameter in parameters.items()}
        self._strings = {name for name, parameter in parameters.items() if parameter.get("type") == "string"}
        self._begin, self._end = tags.begin.strip(), tags.end.strip()
        self._middles = [m.strip() for m in (tags.middle, tags.json_middle) if m]

    def read(self, text: str, start: int) -> tuple[str, int, bool]:
        """Return the arguments as JSON text, where they end, and whether the text ends inside of one.

        Args:
            text: The text of a model.
            start: Where the parameters begin in it.
        """
        values: dict[str, str] = {}
        position = start
        while True:
            begin = _skip_space(text, position)
            if not text.startswith(self._begin, begin):
                rest = text[begin : begin + len(self._begin)]
                is_cut = begin + len(rest) == len(text) and self._begin.startswith(rest)
                members = ", ".join(f"{json.dumps(k, ensure_ascii=False)}: {v}" for k, v in values.items())
                return f"{{{members}}}", position, is_cut
            name = _NAME.match(text, begin + len(self._begin))
            if name is None or name.end() == len(text):
                return "", begin, name is not None or begin + len(self._begin) == len(text)
            middle = next((m for m in self._middles if text.startswith(m, name.end())), None)
            if middle is None:
                rest = text[name.end() :][: max(map(len, self._middles))]
                ends = name.end() + len(rest) == len(text)
                return "", begin, ends and any(m.startswith(rest) for m in self._middles)
            first = name.end() + len(middle)
            end = text.find(self._end, first)
            if end < 0:
                return "", begin, True
            values[name[0]] = self._value(text[first:end], name[0])
            position = end + len(self._end)

    def _value(self, written: str, name: str) -> str:
        """The JSON text of a value."""
        written = written.strip() if self.tags.strips_space else written.removeprefix("\n").removesuffix("\n")
        if self.tags.reads_null and written.lower() == "null" and name not in self._strings:
            return "null"
        kind = self.types.get(name, "string")
        if kind == "string":
            return json.dumps(written, ensure_ascii=False)
        text = written.strip().lower() if kind == "boolean" else written.strip()
        try:
            json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return json.dumps(_number(text, kind, written), ensure_ascii=False)
        return text


def parameter_schemas(schema: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the schema of each parameter, in order. One that refers to a definition is replaced by it."""
    properties = schema.get("properties")
    resolved: dict[str, dict[str, Any]] = {}
    for name, parameter in properties.items() if isinstance(properties, Mapping) else ():
        resolved[name] = _resolve(parameter if isinstance(parameter, Mapping) else {}, schema)
    return resolved


def value_type(schema: Mapping[str, Any]) -> str:
    """Return the type as which a parser of SGLang reads a parameter: "string" unless the schema names another."""
    kind = infer_type(schema)
    return "string" if kind is None or kind == "null" else kind.strip().lower()


def _resolve(parameter: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with the definitions that it needs; a reference at its top is followed."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    resolved = dict(parameter)
    for _ in range(16):  # a definition can be a reference itself
        reference = resolved.pop("$ref", None)
        if not isinstance(reference, str):
            break
        kind, _, name = reference.removeprefix("#/").partition("/")
        target = definitions.get(kind, {}).get(name)
        resolved = {**(target if isinstance(target, Mapping) else {}), **resolved}
    return {**resolved, **definitions} if '"$ref"' in json.dumps(resolved) else resolved


def _number(text: str, kind: str, written: str) -> Any:
    """A number that is not written as in JSON, such as 007; the text as it was written if it is none."""
    try:
        if kind == "integer":
            return int(text)
        number = float(text) if kind == "number" else None
    except ValueError:
        return written
    return (
        written if number is None or number != number or number in (float("inf"), -float("inf")) else number
    )


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return position if match is None else match.end()


_SPACE = re.compile(r"\s*")
