"""Writes the arguments of a call whose parameters stand between tags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sgl_apr.errors import GrammarError
from sgl_apr.formats.call_formats import ParameterTags
from sgl_apr.formats.masks.json_schema import ANNOTATIONS, FORMATS, SchemaPreparer
from sgl_apr.formats.masks.writer import GrammarWriter, TextLimits
from sgl_apr.formats.tagged_values import parameter_schemas, value_type
from sgl_apr.formats.tool_syntax import ToolDefinition


def tagged_arguments(
    writer: GrammarWriter, preparer: SchemaPreparer, tags: ParameterTags, tool: ToolDefinition, index: int
) -> str:
    """Write the rule of a tool's parameters, in their order, and return its symbol.

    Args:
        writer: Of the mask.
        preparer: Prepares the schemas of parameters that are JSON.
        tags: How a parameter is written.
        tool: The tool.
        index: Its index, which names the rules.

    Raises:
        GrammarError: A parameter cannot be written.
    """
    schema = tool.schema
    required = schema.get("required", ())
    symbols: list[str] = []
    for number, (name, parameter) in enumerate(parameter_schemas(schema).items()):
        where = f"tool {tool.name!r}.{name}"
        if preparer.excluded.search(name) or not name or any(c in name for c in "<>\n\0"):
            raise GrammarError(f"{where}: a parameter of this name cannot be written between tags")
        rule = f"parameter_{index}_{number}"
        value = _value(writer, preparer, tags, parameter, f"argument_{index}_{number}", where)
        middle = tags.middle if value_type(parameter) == "string" else tags.json_middle or tags.middle
        writer.lines[rule] = " ".join([*writer.fixed(tags.begin + name + middle), *value])
        symbols.append(rule if name in required else rule + "?")
    if not symbols:
        return '""'
    writer.lines[f"arguments_{index}"] = " ".join(symbols)
    return f"arguments_{index}"


def _value(
    writer: GrammarWriter,
    preparer: SchemaPreparer,
    tags: ParameterTags,
    schema: Mapping[str, Any],
    name: str,
    where: str,
) -> list[str]:
    """The symbols of a value and of the fixed text after it."""
    kind = value_type(schema)
    if kind != "string":
        typed = preparer.prepare(_only(schema, kind), where)
        return [writer.json_value(name, typed), *writer.fixed(tags.end)]
    fixed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if fixed is not None:
        preparer.prepare(schema, where)
        texts = [v for v in fixed if isinstance(v, str) and v == v.strip() and v.lower() != "null"]
        if not texts:
            raise GrammarError(f"{where}: none of its values can be written as plain text")
        writer.lines[name] = " | ".join(map(writer.plain, texts))
        return [name, *writer.fixed(tags.end)]
    return writer.parameter_text(name, tags.end, _limits(writer, preparer, tags, schema, where))


def _limits(
    writer: GrammarWriter,
    preparer: SchemaPreparer,
    tags: ParameterTags,
    schema: Mapping[str, Any],
    where: str,
) -> TextLimits:
    """What a schema requires of plain text."""
    rest = {k: v for k, v in schema.items() if k not in ANNOTATIONS}
    options = rest.pop("anyOf", rest.pop("oneOf", None))
    if options is not None and not any(
        o == {} or (o.get("type") == "string" and len(o) == 1) for o in map(_bare, options)
    ):
        raise GrammarError(f"{where}: none of its alternatives is a string without limits")
    pattern, min_chars = rest.pop("pattern", None), rest.pop("minLength", 0)
    max_chars = rest.pop("maxLength", None)
    preparer.prepare(rest if pattern is None else {**rest, "pattern": pattern}, where)
    if unknown := rest.keys() - {"type", "format", "$defs", "definitions"}:
        raise GrammarError(f"{where}: {min(unknown)!r} cannot be enforced in a parameter that is plain text")
    if rest.get("format") in FORMATS:
        raise GrammarError(f"{where}: 'format' cannot be enforced in a parameter that is plain text")
    if max_chars is not None and min_chars > max_chars:
        raise GrammarError(f"{where}: minLength {min_chars}, expected at most maxLength {max_chars}")
    trimmed = tags.strips_space and (bool(min_chars) or pattern is not None)
    if pattern is None:
        return TextLimits(min_chars, max_chars, trimmed=trimmed)
    if not re.fullmatch(r"\^[^^]*\$", pattern):
        raise GrammarError(
            f"{where}: the pattern {pattern!r:.60}, expected ^...$ in a parameter that is plain text"
        )
    if writer.BACKEND == "xgrammar" and (min_chars or max_chars is not None or trimmed):
        raise GrammarError(
            f"{where}: the grammar backend xgrammar cannot enforce a pattern and another limit; expected "
            "--grammar-backend llguidance"
        )
    return TextLimits(min_chars, max_chars, pattern[1:-1], trimmed)


def _bare(schema: Any) -> dict[str, Any]:
    """A schema without annotations."""
    mapping = schema if isinstance(schema, Mapping) else {}
    return {k: v for k, v in mapping.items() if k not in ANNOTATIONS}


def _only(schema: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A schema limited to one type and null, since a parser reads every value as that type."""
    declared = schema.get("type")
    if isinstance(declared, list):
        return {**schema, "type": [t for t in declared if t in (kind, "null")]}
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return {**schema, key: [s for s in schema[key] if value_type(s) in (kind, "null")]}
    return dict(schema)
