"""Parts of the JSON schemas of our requests and responses."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]
REFERENCE = "#/components/schemas/Apr{model}"


def attribute_texts(kind: type) -> dict[str, str]:
    """Return the texts of the section `Attributes` of a class's docstring, by attribute."""
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def object_schema(properties: Mapping[str, Schema], *, required: bool = False) -> Schema:
    """Return the schema of an object with these properties and no others."""
    schema: Schema = {"type": "object", "properties": dict(properties), "additionalProperties": False}
    return schema | ({"required": list(properties)} if required else {})


def nullable(schema: Schema) -> Schema:
    """Return a schema that also allows null."""
    return {"anyOf": [schema, {"type": "null"}]}


def describe(schema: Schema, text: str) -> Schema:
    """Return a schema with a description."""
    return {**schema, "description": text} if text else dict(schema)


def reference(name: str) -> Schema:
    """Return a reference to a schema, by its name without `Apr`."""
    return {"$ref": REFERENCE.format(model=name)}
