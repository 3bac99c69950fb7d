"""Tools: what a typed function says about itself, OpenAI's form, and the arguments of a call."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

import sgl_apr as apr
from sgl_apr.runtime.tools.tool import make_tools


class Place(BaseModel):
    city: str
    title: str = "none"


def search(query: Annotated[str, Field(min_length=1)], limit: int = 5, *, deep: bool = False) -> str:
    """Search the library.

    All of it.

    Args:
        query: What to look for,
            in a few words.
        limit (int): How many.

    Returns:
        text: No argument.
    """
    return f"{query} {limit} {deep}"


class Weather:
    """A service."""

    def forecast(self, place: Place, unit: Literal["C", "F"] = "C") -> str:
        """Tell the weather."""
        return f"{place.city} {unit}"

    async def __call__(self, days: int | None = None) -> str:
        """The next days."""
        return str(days)


def test_a_typed_function_describes_itself():
    tool = apr.Tool.from_function(search)
    assert (tool.name, tool.description) == ("search", "Search the library.\n\nAll of it.")
    assert tool.schema == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "minLength": 1, "description": "What to look for, in a few words."},
            "limit": {"type": "integer", "default": 5, "description": "How many."},
            "deep": {"type": "boolean", "default": False},
        },
        "required": ["query"],
        "additionalProperties": False,
    }


def test_methods_objects_and_partial_functions_are_tools():
    method = apr.Tool.from_function(Weather().forecast)
    assert (method.name, method.description) == ("forecast", "Tell the weather.")
    assert method.schema["properties"]["unit"] == {"type": "string", "enum": ["C", "F"], "default": "C"}
    # A property that is called title is no title of a schema.
    assert method.schema["$defs"]["Place"]["properties"]["title"] == {"type": "string", "default": "none"}
    assert method.check_arguments('{"place": {"city": "Oslo"}}') == {"place": Place(city="Oslo"), "unit": "C"}
    called = apr.Tool.from_function(Weather(), name="weather")
    assert (called.name, called.description, list(called.schema["properties"])) == (
        "weather",
        "The next days.",
        ["days"],
    )
    assert list(apr.Tool.from_function(partial(search, "x")).schema["properties"]) == ["limit", "deep"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda *words: "", "'words' is passed by position"),
        (lambda word, /: "", "'word' is passed by position"),
        (3, "expected a function or a Tool"),
    ],
)
def test_functions_that_cannot_be_called_by_name_are_refused(function, message):
    with pytest.raises(apr.AprError, match=message):
        apr.Tool.from_function(function, name="t")


def test_a_type_without_a_schema_is_named():
    class Opaque: ...

    def read(handle: Opaque) -> str:
        return ""

    read.__annotations__["handle"] = Opaque
    with pytest.raises(apr.AprError, match=r"tool read: its arguments have no JSON schema.*Opaque"):
        apr.Tool.from_function(read)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "é", "a.b", 3])
def test_names_are_those_of_openai(name):
    with pytest.raises(apr.AprError, match="expected 1 to 64 letters"):
        apr.Tool(name)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (3, "expected a JSON schema"),
        ({"type": "array"}, "expected an object"),
        ({"type": "object", "properties": {"a": 3}}, "no JSON schema"),
        ({"properties": {"a": {"$ref": "http://localhost/x"}}}, "expected a reference within the schema"),
        ({"properties": {"a": {"default": {1, 2}}}}, "which JSON cannot express"),
    ],
)
def test_schemas_are_checked_when_the_tool_is_made(schema, message):
    with pytest.raises(apr.AprError, match=message):
        apr.Tool("t", parameters=schema)
    nested = {}
    for _ in range(100):
        nested = {"properties": {"a": nested}}
    with pytest.raises(apr.AprError, match="deep"):
        apr.Tool("t", parameters=nested)


def test_openai_form_both_ways():
    tool = apr.Tool("add", "Add.", {"type": "object", "properties": {"a": {"type": "integer"}}})
    assert apr.Tool.from_openai(tool.to_openai()) == tool
    flat = {"type": "function", **tool.to_openai()["function"], "strict": True}
    assert apr.Tool.from_openai(flat) == tool
    assert apr.Tool.from_openai({"type": "function", "function": {"name": "now"}}).schema == {
        "type": "object",
        "properties": {},
    }
    for wrong in ({"type": "web_search"}, {"type": "function"}, "add", {"function": {"name": "a", "nme": 1}}):
        with pytest.raises(apr.AprError):
            apr.Tool.from_openai(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"query": ""}', "query: String should have at least 1 character"),
        ("{}", "query: Missing required argument"),
        ('{"query": "x", "other": 1}', "other: Unexpected keyword argument"),
        ("[1]", "expected a JSON object"),
        ("{", "the arguments are no JSON"),
        ("[" * 100_000, "the arguments are no JSON"),
    ],
)
def test_arguments_that_do_not_fit_a_function_are_named(arguments, message):
    with pytest.raises(apr.AprError, match=message):
        apr.Tool.from_function(search).check_arguments(arguments)


def test_arguments_are_checked_by_a_schema_of_their_own():
    schema = {
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/N"}},
        "required": ["n"],
        "$defs": {"N": {"type": "integer", "minimum": 1}},
    }
    tool = apr.Tool("count", parameters=schema)
    assert tool.check_arguments('{"n": 2}') == {"n": 2}
    for wrong, message in [('{"n": 0}', r"\$.n: 0 is less than"), ("{}", "required property")]:
        with pytest.raises(apr.AprError, match=message):
            tool.check_arguments(wrong)
    with pytest.raises(apr.AprError, match="cannot be applied"):
        apr.Tool("t", parameters={"properties": {"a": {"$ref": "#/nowhere"}}}).check_arguments('{"a": 1}')


def test_tools_are_made_of_functions_and_have_different_names():
    assert [tool.name for tool in make_tools([search, apr.Tool("other")])] == ["search", "other"]
    with pytest.raises(apr.AprError, match="two tools have the name 'search'"):
        make_tools([search, search])
    for wrong in ("search", {"a": 1}, search):
        with pytest.raises(apr.AprError, match="expected a list of functions and Tools"):
            make_tools(wrong)
