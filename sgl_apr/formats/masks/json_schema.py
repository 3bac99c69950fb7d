"""Prepares JSON schemas for grammar backends: checks what they can enforce, and makes every object strict."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any

from sgl_apr.errors import GrammarError

ANY = "apr_any"  # the definition of any JSON value
STRING = "apr_string"  # the definition of a string without tags
MAX_DEPTH = 32
ANNOTATIONS = frozenset(
    [
        "$schema",
        "$id",
        "$comment",
        "$anchor",
        "title",
        "description",
        "default",
        "examples",
        "example",
        "deprecated",
        "readOnly",
        "writeOnly",
        "discriminator",
        "strict",
        "nullable",
    ]
)
BY_TYPE = {
    "object": frozenset(
        [
            "properties",
            "required",
            "additionalProperties",
            "patternProperties",
            "minProperties",
            "maxProperties",
        ]
    ),
    "array": frozenset(["items", "prefixItems", "minItems", "maxItems"]),
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "number": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]),
}
ANY_TYPE = frozenset(["type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions"])
KNOWN = ANY_TYPE.union(*BY_TYPE.values())
TYPES = frozenset(("object", "array", "string", "number", "integer", "boolean", "null"))
FORMATS = frozenset(
    ("date", "time", "date-time", "uuid", "ipv4")
)  # others are annotations, as in the standard
XGRAMMAR_LACKS = frozenset(("patternProperties", "minProperties", "maxProperties", "multipleOf"))
XGRAMMAR_ALONE = (
    {"enum"},
    {"const"},
    {"pattern"},
    {"format"},
    {"minLength", "maxLength"},
)  # it drops all but one


class SchemaPreparer:
    """Rewrites the schemas of one mask so that every string in them is without tags.

    Args:
        excluded: A regular expression for tags, which must not occur in a string.
        string_pattern: The pattern that every string has to match, None if the backend excludes tags by itself.
        backend: The grammar backend, for messages.
    """

    def __init__(self, excluded: re.Pattern[str], string_pattern: str | None, backend: str) -> None:
        self.excluded, self.string_pattern, self.backend = excluded, string_pattern, backend
        self._used: set[str] = set()  # of the added definitions
        self._root: Mapping[str, Any] = {}

    def prepare(self, schema: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return a schema that the backend enforces completely.

        Objects have no other properties than the declared ones, unless they declare none.

        Args:
            schema: The schema.
            where: What it is of, for messages.

        Raises:
            GrammarError: It holds something that the backend cannot enforce. The message names it.
        """
        self._used.clear()
        self._root = schema
        prepared = self._schema(schema, where, MAX_DEPTH)
        added = {name: self._definitions[name] for name in (STRING, ANY) if name in self._used}
        return {**prepared, "$defs": {**prepared.get("$defs", {}), **added}} if added else prepared

    def _schema(self, schema: Any, where: str, depth: int) -> dict[str, Any]:
        if not depth:
            raise GrammarError(f"{where}: the schema is nested more than {MAX_DEPTH} levels deep")
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            raise GrammarError(f"{where}: {json.dumps(schema)[:60]}, expected a JSON schema")
        schema = {k: v for k, v in schema.items() if k not in ANNOTATIONS}
        if schema.get("format") not in FORMATS:
            schema.pop("format", None)
        self._check_keywords(schema, where)
        self._check_strings(schema, where)
        for pattern in schema.get("patternProperties") or ():
            if not re.fullmatch(r"\^[^<.^]*\$", pattern) or re.search(r"\\[SDWPs]", pattern):
                raise GrammarError(
                    f"{where}: the names of properties are not limited by {pattern!r:.60}, expected ^...$ without "
                    "characters of every kind"
                )
        prepared: dict[str, Any] = {}
        for key, value in schema.items():
            place = f"{where}.{key}"
            if key in ("properties", "patternProperties", "$defs", "definitions"):
                if not isinstance(value, Mapping):
                    raise GrammarError(f"{place}: expected an object")
                inner = place if key.startswith(("$", "def", "pattern")) else where
                prepared[key] = {k: self._schema(v, f"{inner}.{k}", depth - 1) for k, v in value.items()}
            elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
                if not isinstance(value, list) or not value:
                    raise GrammarError(f"{place}: expected a list of schemas")
                options = [self._schema(v, f"{place}[{i}]", depth - 1) for i, v in enumerate(value)]
                if key == "oneOf" and not _are_disjoint([self._resolved(v) for v in value]):
                    raise GrammarError(f"{place}: its alternatives can hold for one value, expected 'anyOf'")
                prepared["anyOf" if key == "oneOf" else key] = options
            elif key == "items" and value is not False:
                prepared[key] = self._schema(value, place, depth - 1)
            elif key != "additionalProperties":
                prepared[key] = value
        return self._strict(prepared, schema, where, depth)

    def _strict(
        self, prepared: dict[str, Any], schema: Mapping[str, Any], where: str, depth: int
    ) -> dict[str, Any]:
        """Complete a schema by what it leaves open."""
        types = self._types(prepared, where)
        if types is None:
            if prepared.keys() & (ANY_TYPE - {"type", "$defs", "definitions"}):
                return prepared
            return {**self._reference(ANY), **prepared}
        prepared["type"] = types[0] if len(types) == 1 else types
        fixed = prepared.get("enum", [prepared["const"]] if "const" in prepared else None)
        if isinstance(fixed, list):
            fitting = [v for v in fixed if _has_type(v, types)]
            if not fitting:
                raise GrammarError(f"{where}: none of its values has the type {json.dumps(prepared['type'])}")
            prepared = {k: v for k, v in prepared.items() if k != "const"} | {"enum": fitting}
        if "object" in types:
            declared = prepared.get("properties", {})
            missing = [k for k in prepared.get("required", ()) if k not in declared]
            if missing and (declared or self.backend == "xgrammar"):
                raise GrammarError(
                    f"{where}: requires {str(missing[0])!r:.60}, which is none of its properties"
                )
            extra = schema.get("additionalProperties", "properties" not in schema)
            if extra is False or prepared.get("properties") or prepared.get("patternProperties"):
                prepared["additionalProperties"] = False
            else:
                self._allow_properties(prepared, self._schema(extra, f"{where}.*", depth - 1))
        if "array" in types and "items" not in prepared:
            prepared["items"] = False if "prefixItems" in prepared else self._reference(ANY)
        limited = prepared.keys() & {"enum", "const", "format", "$ref", "anyOf", "oneOf"}
        if prepared == {"type": "string"}:
            return self._reference(STRING, prepared)
        if "string" in types and self.string_pattern is not None and not limited:
            prepared["allOf"] = [*prepared.get("allOf", ()), {"pattern": self.string_pattern}]
        return prepared

    def _allow_properties(self, prepared: dict[str, Any], value: dict[str, Any]) -> None:
        """Allow any property whose name holds no tag."""
        if self.string_pattern is None:
            prepared["additionalProperties"] = value
        else:
            prepared |= {"patternProperties": {self.string_pattern: value}, "additionalProperties": False}

    def _reference(self, name: str, otherwise: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A reference to an added definition; another schema if the backend excludes tags by itself."""
        if self.string_pattern is None:
            return dict(otherwise or {})
        self._used |= {name, STRING}
        return {"$ref": f"#/$defs/{name}"}

    @cached_property
    def _definitions(self) -> dict[str, Any]:
        """Any JSON value, and a string without tags."""
        value, text = ({"$ref": f"#/$defs/{name}"} for name in (ANY, STRING))
        keys = {"patternProperties": {self.string_pattern: value}, "additionalProperties": False}
        scalar = {"type": ["null", "boolean", "number"]}
        array = {"type": "array", "items": value}
        return {
            STRING: {"type": "string", "pattern": self.string_pattern},
            ANY: {"anyOf": [scalar, text, array, {"type": "object", **keys}]},
        }

    def _types(self, schema: Mapping[str, Any], where: str) -> list[str] | None:
        """The types that a schema names, or that its keywords are about; None if it is open."""
        declared = schema.get("type")
        if declared is None:
            about = [kind for kind, keys in BY_TYPE.items() if schema.keys() & keys]
            if len(about) > 1:
                raise GrammarError(f"{where}: no type, expected one of {', '.join(sorted(TYPES))}")
            return about or None
        types = [declared] if isinstance(declared, str) else declared
        if not isinstance(types, list) or not types or not set(types) <= TYPES:
            raise GrammarError(
                f"{where}: type {json.dumps(declared)[:60]}, expected some of {', '.join(sorted(TYPES))}"
            )
        return types

    def _resolved(self, schema: Any) -> dict[str, Any]:
        """A schema whose reference at the top is followed."""
        resolved = dict(schema) if isinstance(schema, Mapping) else {}
        kind, _, name = str(resolved.get("$ref", "")).removeprefix("#/").partition("/")
        definitions = self._root.get(kind) if kind in ("$defs", "definitions") else None
        target = definitions.get(name) if isinstance(definitions, Mapping) else None
        return {**target, **resolved} if isinstance(target, Mapping) else resolved

    def _check_keywords(self, schema: Mapping[str, Any], where: str) -> None:
        lacking = XGRAMMAR_LACKS if self.backend == "xgrammar" else frozenset()
        for key in schema:
            if key not in KNOWN or key in lacking:
                raise GrammarError(f"{where}: the grammar backend {self.backend} cannot enforce {key!r}")
        if re.search(r"\(\?(?!:)|\\[1-9bB]", str(schema.get("pattern", ""))):
            raise GrammarError(
                f"{where}: the pattern {schema['pattern']!r:.60} looks around or refers to a group"
            )
        if self.backend == "xgrammar":
            if len(schema.get("allOf", ())) > 1:
                raise GrammarError(
                    f"{where}: the grammar backend xgrammar cannot enforce 'allOf' of several schemas"
                )
            combined = schema.keys() & {"anyOf", "oneOf", "allOf", "$ref"}
            rest = schema.keys() - combined - {"$defs", "definitions"}
            limits = [min(keys & schema.keys()) for keys in XGRAMMAR_ALONE if keys & schema.keys()]
            together = sorted(combined | rest) if combined and (rest or len(combined) > 1) else limits
            if len(together) > 1:
                raise GrammarError(
                    f"{where}: the grammar backend xgrammar cannot enforce {together[0]!r} together with {together[1]!r}"
                )
            pattern = schema.get("pattern")
            if pattern is not None and re.search(r"[<.^]|\\[SDWPs]|\$.", str(pattern).removeprefix("^")):
                raise GrammarError(
                    f"{where}: the grammar backend xgrammar cannot keep tags out of the pattern {pattern!r:.60}"
                )

    def _check_strings(self, schema: Mapping[str, Any], where: str) -> None:
        """Check that no fixed string of a schema holds a tag."""
        fixed = [schema.get("enum"), schema.get("const"), *(schema.get("properties") or ())]
        for text in _strings(fixed):
            if self.excluded.search(text):
                raise GrammarError(f"{where}: {text!r:.60} holds a tag of the format or of a call")


def _has_type(value: Any, types: list[str]) -> bool:
    """Whether a JSON value has one of some types."""
    match value:
        case None:
            return "null" in types
        case bool():
            return "boolean" in types
        case int() | float():
            return "number" in types or ("integer" in types and value == int(value))
        case str():
            return "string" in types
        case list():
            return "array" in types
    return "object" in types


def _are_disjoint(options: list[dict[str, Any]]) -> bool:
    """Whether no value fits two schemas: their types differ, or the values of a property that all of them require."""

    def differ(values: list[list[Any]]) -> bool:
        texts = [{json.dumps(v, sort_keys=True) for v in some} for some in values]
        return all(texts) and sum(map(len, texts)) == len(set().union(*texts))

    def types(option: Mapping[str, Any]) -> list[Any]:
        declared = option.get("type")
        listed = declared if isinstance(declared, list) else [declared] if declared else []
        return ["number" if t == "integer" else t for t in listed]

    def values(option: Mapping[str, Any], name: str) -> list[Any]:
        fixed = option["properties"][name]
        enum = fixed.get("enum") if isinstance(fixed, Mapping) else None
        return enum if isinstance(enum, list) else [fixed["const"]] if "const" in fixed else []

    if differ([types(option) for option in options]):
        return True
    required = [set(o.get("required", ())) & set(o.get("properties", ())) for o in options]
    return any(differ([values(o, name) for o in options]) for name in set.intersection(*required))


@lru_cache(maxsize=64)
def first_characters(schema: str) -> str:
    """Return the characters with which JSON that fits a schema can begin, for a character class."""
    kind = json.loads(schema).get("type")
    return {"object": "{", "array": "\\["}.get(kind if isinstance(kind, str) else "", '{\\["\\-0-9tfn')


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (key, *_strings(item))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
