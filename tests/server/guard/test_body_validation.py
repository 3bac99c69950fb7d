"""The validation of bodies: many errors and long values are not repeated in a response."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from fastapi import Body
from fastapi._compat.v2 import ModelField
from pydantic import BaseModel, Field, field_validator
from pydantic.fields import FieldInfo

from sgl_apr.server.guard.body_validation import MAX_ERRORS, MAX_MESSAGE, list_entries, validate

ORIGINAL = ModelField.validate


class Chat(BaseModel):
    """Has a list of objects of two kinds, as requests of SGLang have."""

    tools: list[dict[str, int] | list[str]] = []
    bias: dict[str, float] = {}
    pairs: Annotated[list[int], Field(min_length=5000)] = []
    text: str = ""
    echo: str = ""

    @field_validator("echo")
    @classmethod
    def _quote(cls, value: str) -> str:
        if value:
            raise ValueError(f"no {value}")
        return value


def field() -> ModelField:
    info: FieldInfo = Body()
    info.annotation = Chat
    return ModelField(info, "body")


def errors(body: Any) -> list[dict[str, Any]]:
    value, listed = validate(ORIGINAL, field(), body, {}, loc=("body",))
    assert value is None
    return listed


def test_a_valid_body_is_what_fastapi_makes_of_it():
    value, listed = validate(ORIGINAL, field(), {"tools": [{"a": 1}, ["b"]]}, {}, loc=("body",))
    assert (value, listed) == (Chat(tools=[{"a": 1}, ["b"]]), [])


@pytest.mark.parametrize(
    "body", [{"tools": [1, {"a": "b"}]}, {"text": 5, "bias": [1, 2]}, None, [1], "x", {"echo": "a"}]
)
def test_few_errors_are_those_of_fastapi(body: Any):
    assert str(errors(body)) == str(ORIGINAL(field(), body, {}, loc=("body",))[1])


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [1] * 20_000},
        {"bias": {str(i): "a" for i in range(5000)}},
        {"tools": [["a"] * 100 + [[]]] * 500},
    ],
)
def test_some_of_many_errors_are_listed_with_their_number(body: dict[str, Any]):
    listed = errors(body)
    count = len(ORIGINAL(field(), body, {}, loc=("body",))[1])
    assert len(listed) <= MAX_ERRORS + 1
    assert len(str(listed)) < 10_000
    assert listed[-1]["msg"].startswith(
        f"the body has {count} errors, of which at most {MAX_ERRORS} are listed; "
    )
    assert {error["loc"][0] for error in listed} == {"body"}


def test_the_first_errors_name_their_place():
    listed = errors({"tools": [1] * 10_000})
    assert listed[0]["loc"][:3] == ("body", "tools", 0)
    assert listed[0]["input"] == 1


@pytest.mark.parametrize(
    "value", [["a" * 100] * 10_000, {"a": ["b" * 100_000]}, {str(i): [[i]] for i in range(10_000)}]
)
def test_a_long_value_is_shown_in_short(value: Any):
    (error,) = errors({"text": value})
    assert error["loc"] == ("body", "text")
    assert len(str(error)) < 5000


def test_a_long_message_is_cut():
    (error,) = errors({"echo": "a" * 100_000})
    assert len(error["msg"]) == MAX_MESSAGE + len("...")
    assert len(str(error["input"])) < 1000


@pytest.fixture
def many_entries() -> Iterator[None]:
    token = list_entries.set(100_000)
    yield
    list_entries.reset(token)


@pytest.mark.parametrize(
    "entries",
    [[1] * 20_000, [*([["a"]] * 500), *([None] * 19_500)]],
)
def test_long_lists_are_validated_by_a_sample_first(many_entries: None, entries: list[Any]):
    """Also where the first entries are valid. Validating all takes many times as long."""
    body, numbers = {"tools": entries}, []
    for validator in (validate, lambda original, *args, **options: original(*args, **options)):
        begin = time.process_time()
        value, listed = validator(ORIGINAL, field(), body, {}, loc=("body",))
        numbers.append((value, len(listed) > 0, time.process_time() - begin))
    (value, has_errors, seconds), (_, _, complete) = numbers
    assert (value, has_errors) == (None, True)
    assert seconds < complete / 5
    assert validate(ORIGINAL, field(), body, {}, loc=("body",))[1][-1]["msg"].startswith(
        "the body has many errors"
    )


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"a": 1}, ["b"]] * 5000},
        {"pairs": [1, 2] * 3000},
        {"bias": {"a": 1.5}, "tools": [[], {}] * 900},
    ],
)
def test_long_lists_without_errors_are_valid(many_entries: None, body: dict[str, Any]):
    """Also those of which a sample has an error that they do not have."""
    value, listed = validate(ORIGINAL, field(), body, {}, loc=("body",))
    assert (value, listed) == (Chat(**body), [])
