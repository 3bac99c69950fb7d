"""Checks that a grammar of a request can be compiled in reasonable time.

The compilers combine the alternatives of all parts of an `allOf`: their number is the product of the parts'. The time
for an EBNF grammar grows faster than its number of rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import orjson

from sgl_apr.server.guard.limits import GuardLimits
from sgl_apr.server.guard.refusal import RequestRefused, over_limit

MAX_COMBINATIONS = 256  # alternatives that one schema stands for
MAX_SCHEMA_DEPTH = 100  # of nested objects and lists, references included
CHARS_PER_RULE = 128  # a grammar of the default 65,536 characters may have 512 rules
MIN_RULES = 512
LOCAL = "#/"
# The begin of a rule, `name ::=` in GBNF and `name:` in Lark's syntax. It also matches in strings, so the count is an
# upper bound. A filter for strings could be deceived into skipping rules.
RULE = re.compile(r"::=|[\w\])}]\s*:(?!:)")


def check_grammar_size(grammar: str | None, limits: GuardLimits, name: str = "ebnf") -> None:
    """Check how many rules a grammar has. The number may be higher if the operator allows longer grammars.

    Args:
        grammar: An EBNF grammar, or a structural tag, which may contain some.
        limits: The operator's limits.
        name: The field.

    Raises:
        RequestRefused: It has too many.
    """
    if not grammar:
        return
    if name == "structural_tag":
        try:
            grammar = orjson.dumps(orjson.loads(grammar)).decode()  # without escaped colons
        except (ValueError, TypeError):
            return
    limit = max(MIN_RULES, limits.grammar_chars // CHARS_PER_RULE)
    if (rules := sum(1 for _ in RULE.finditer(grammar))) > limit:
        raise over_limit(
            f"the number of rules of {name}", rules, f"--apr-max-grammar-chars / {CHARS_PER_RULE}", limit, name
        )  # fmt: skip


def check_schema(json_schema: str | None, name: str = "json_schema") -> None:
    """Check a JSON schema. One that is not JSON passes, because the compiler refuses it.

    Args:
        json_schema: The schema, or a structural tag, which contains some.
        name: The field.

    Raises:
        RequestRefused: One of its schemas combines too many alternatives, or it is nested too deep.
    """
    if not json_schema:
        return
    try:
        schema = orjson.loads(json_schema)
    except ValueError:
        return
    combinations = _Combinations(schema, name)
    combinations.count(schema)
    if combinations.highest > MAX_COMBINATIONS:
        raise RequestRefused(
            f"{name} has an allOf that combines {combinations.highest:.0f} alternatives, "
            f"expected at most {MAX_COMBINATIONS}",
            name,
        )


class _Combinations:
    """Counts how many alternatives each schema of a document stands for.

    Attributes:
        highest: The highest number for a schema with `allOf`.
    """

    def __init__(self, document: Any, name: str) -> None:
        self.highest = 1.0
        self._document, self._name = document, name
        self._by_reference: dict[str, float] = {}

    def count(self, schema: Any, depth: int = 0) -> float:
        """Return how many alternatives a schema stands for, and visit all schemas in it."""
        if depth > MAX_SCHEMA_DEPTH:
            raise RequestRefused(
                f"{self._name} is nested more than {MAX_SCHEMA_DEPTH} deep, references included, expected at most that",
                self._name,
            )
        if isinstance(schema, list):
            for entry in schema:
                self.count(entry, depth + 1)
            return 1
        if not isinstance(schema, Mapping):
            return 1
        total = 1.0
        if isinstance(schema.get("$ref"), str):
            total = self._count_reference(schema["$ref"], depth)
        for name, value in schema.items():
            counts = [self.count(entry, depth + 1) for entry in value] if isinstance(value, list) else []
            if name == "allOf":
                total *= math.prod(counts)
            elif name in ("anyOf", "oneOf"):
                total *= max(1, sum(counts))
            elif not isinstance(value, list):
                self.count(value, depth + 1)
        total = min(total, 1e300)
        if "allOf" in schema:
            self.highest = max(self.highest, total)
        return total

    def _count_reference(self, reference: str, depth: int) -> float:
        if reference not in self._by_reference:
            self._by_reference[reference] = 1.0  # what refers to itself
            self._by_reference[reference] = self.count(self._resolve(reference), depth + 1)
        return self._by_reference[reference]

    def _resolve(self, reference: str) -> Any:
        if not reference.startswith(LOCAL):
            return None
        schema = self._document
        for part in reference.removeprefix(LOCAL).split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, Mapping) else None
        return schema
