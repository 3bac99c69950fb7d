"""Checks that a grammar of a request can be compiled in reasonable time.

The compilers combine the alternatives of all parts of an `allOf`: their number is the product of the parts'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson

from sgl_apr.server.guard.refusal import RequestRefused

MAX_COMBINATIONS = 256  # alternatives that one schema stands for
LOCAL = "#/"


def check_schema(json_schema: str | None) -> None:
    """Check a JSON schema. One that is not JSON passes, because the compiler refuses it.

    Raises:
        RequestRefused: One of its schemas combines too many alternatives.
    """
    if not json_schema or '"allOf"' not in json_schema:
        return
    try:
        schema = orjson.loads(json_schema)
    except ValueError:
        return
    combinations = _Combinations(schema)
    combinations.count(schema)
    if combinations.highest > MAX_COMBINATIONS:
        raise RequestRefused(
            f"json_schema has an allOf that combines {combinations.highest:.0f} alternatives, "
            f"expected at most {MAX_COMBINATIONS}",
            "json_schema",
        )


class _Combinations:
    """Counts how many alternatives each schema of a document stands for.

    Attributes:
        highest: The highest number for a schema with `allOf`.
    """

    def __init__(self, document: Any) -> None:
        self.highest = 1.0
        self._document = document
        self._by_reference: dict[str, float] = {}

    def count(self, schema: Any) -> float:
        """Return how many alternatives a schema stands for, and visit all schemas in it."""
        if isinstance(schema, list):
            for entry in schema:
                self.count(entry)
            return 1
        if not isinstance(schema, Mapping):
            return 1
        total = self._count_reference(schema["$ref"]) if isinstance(schema.get("$ref"), str) else 1.0
        for name, value in schema.items():
            counts = [self.count(entry) for entry in value] if isinstance(value, list) else []
            if name == "allOf":
                total *= math.prod(counts)
            elif name in ("anyOf", "oneOf"):
                total *= max(1, sum(counts))
            elif not isinstance(value, list):
                self.count(value)
        total = min(total, 1e300)
        if "allOf" in schema:
            self.highest = max(self.highest, total)
        return total

    def _count_reference(self, reference: str) -> float:
        if reference not in self._by_reference:
            self._by_reference[reference] = 1.0  # what refers to itself
            self._by_reference[reference] = self.count(self._resolve(reference))
        return self._by_reference[reference]

    def _resolve(self, reference: str) -> Any:
        if not reference.startswith(LOCAL):
            return None
        schema = self._document
        for part in reference.removeprefix(LOCAL).split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, Mapping) else None
        return schema
