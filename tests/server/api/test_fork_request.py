"""Requests for forks of a context: parsed, limited by the operator, and described by a schema."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

import sgl_apr as apr
from sgl_apr.server.api.fork.request import ForkRequest
from sgl_apr.server.api.fork.service import check_text_size
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.server.api.options import OptionsParser
from sgl_apr.server.api.schemas import add_components
from tests.server.api.test_schemas import document, whole_numbers

CHAT = [{"role": "user", "content": "A long document."}]
NO_LIMITS = RequestLimits()


def parse(limits: RequestLimits = NO_LIMITS, **body: Any) -> ForkRequest:
    request = ForkRequest.from_json(json.dumps(body).encode())
    return request.with_options(request.options, limits)


def is_described(body: Any) -> bool:
    """Whether a body fits the schema of a request."""
    document = add_components({})
    schema = {"$ref": "#/components/schemas/AprForkRequest", **document}
    return jsonschema.Draft202012Validator(schema).is_valid(body)


def test_tasks_and_merges_are_text_messages_or_objects():
    format_ = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}
    tasks = [
        "one",
        CHAT,
        {"prompt": "two", "name": "second", "temperature": 0.5, "stop": "x", "max_tokens": 5},
        {"messages": CHAT, "budget": {"seconds": 3}, "response_format": format_, "sampling": {"top_p": 0.5}},
    ]
    body = {
        "messages": CHAT,
        "tasks": tasks,
        "merge": {"prompt": "m", "join": "kv"},
        "stream": True,
        "policy": "first",
    }
    request = parse(**body, temperature=1)
    assert is_described({**body, "temperature": 1})
    assert [task.name for task in request.tasks] == ["1", "2", "second", "4"]
    assert request.tasks[2] == apr.ForkTask("two", "second", {"temperature": 0.5}, stop="x", max_tokens=5)
    assert request.tasks[3].prompt == CHAT
    assert request.merge == apr.Merge("m", join="kv")
    assert (request.prompt, request.policy, request.stream) == (CHAT, "first", True)
    assert request.options == {"temperature": 1, "budget": apr.Budget()}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tasks": ["a"]}, "the body has 0 prompts, expected one of prompt, input_ids, messages"),
        ({"prompt": "p", "input_ids": [1], "tasks": ["a"]}, "the body has 2 prompts"),
        ({"prompt": "p", "task": ["a"]}, "no option 'task', did you mean 'tasks'"),
        ({"message": CHAT, "tasks": ["a"]}, "no option 'message', did you mean 'messages'"),
        ({"prompt": "p"}, "tasks has 0 tasks, expected 1 to 256"),
        ({"prompt": "p", "tasks": "a"}, "tasks='a', expected"),
        ({"prompt": "p", "tasks": ["a", ""]}, "task 2: the prompt of a task is ''"),
        ({"prompt": "p", "tasks": ["a", {"name": "x"}]}, "task 2: {'name': 'x'} has no prompt of its own"),
        ({"prompt": "p", "tasks": [{"prompt": "a", "messages": CHAT}]}, "expected prompt or messages"),
        ({"prompt": "p", "tasks": [{"prompt": "a", "temprature": 1}]}, "task 1: no field of a task 'temprature', did you mean"),
        ({"prompt": "p", "tasks": [{"prompt": "a", "stop": 3}]}, "task 1: stop=3, expected text"),
        ({"prompt": "p", "tasks": ["a"], "merge": {"prompt": "m", "tools": []}}, "merge: no field of a merge 'tools'"),
        ({"prompt": "p", "tasks": ["a"], "stream": 1}, "stream=1, expected true or false"),
        ({"prompt": "p", "tasks": ["a"], "budget": {"tokens": 0}}, "budget tokens=0, expected at least 1"),
        ({"prompt": "p", "tasks": ["a"], "budget": {"depht": 1}}, "did you mean 'depth'"),
        ({"prompt": "p", "tasks": ["a"], "retry": {"attempts": 11}}, "retry attempts=11, expected at most 10"),
        ({"prompt": "p", "tasks": ["a"], "merges": "b"}, "no option 'merges', did you mean 'merge'"),
        ({"prompt": "p", "tasks": ["a"], "width": 3}, "no option 'width'"),
        ({"prompt": "p", "tasks": ["a"], "temperature": -1}, "temperature=-1, expected"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_and_does_not_fit_its_schema(body: dict[str, Any], message: str):
    with pytest.raises(apr.AprError) as error:
        parse(**body)
    assert message in str(error.value)
    assert not is_described(body)


def test_a_dialect_is_no_option_of_a_fork():
    for name, value in (("dialect", "spawn"), ("join", "kv"), ("mode", "parallel")):
        with pytest.raises(apr.AprError, match=f"no option '{name}'"):
            parse(prompt="p", tasks=["a"], **{name: value})
        assert not is_described({"prompt": "p", "tasks": ["a"], name: value})


def test_tools_are_those_of_the_operator():
    def search(query: str) -> str:
        "Search."
        return query

    tool = apr.Tool.from_function(search)
    tasks = [
        {"prompt": "a", "tools": ["search"], "tool_choice": "required"},
        {"prompt": "b", "tools": []},
        "c",
    ]
    body = {"prompt": "p", "tasks": tasks, "tools": "all", "parallel_tool_calls": False}
    request = ForkRequest.from_json(json.dumps(body).encode(), [tool])
    assert is_described(body)
    assert [task.own_tools for task in request.tasks] == [(tool,), (), None]
    assert request.tools.for_task(request.tasks[2]) == {"tools": (tool,), "parallel_tool_calls": False}
    for wrong, message in (
        ({"tools": ["serach"]}, "tools has 'serach', did you mean 'search'"),
        ({"tools": [{"type": "function"}]}, 'expected "all" or a list with some of search'),
        ({"tasks": [{"prompt": "a", "tools": ["x"]}]}, "task 1: tools has 'x', expected"),
        ({"tool_choice": 3}, "tool_choice=3, expected"),
    ):
        with pytest.raises(apr.AprError) as error:
            ForkRequest.from_json(json.dumps({**body, **wrong}).encode(), [tool])
        assert message in str(error.value)
    with pytest.raises(apr.AprError, match="this server has no tools of its own: start it with --apr-tools"):
        ForkRequest.from_json(json.dumps(body).encode())


def test_the_operator_limits_workers_tokens_and_seconds():
    limits = RequestLimits(width=2, tokens=100, seconds=9.0)
    assert parse(limits, prompt="p", tasks=["a", "b"]).options["budget"] == apr.Budget(
        tokens=100, seconds=9.0
    )
    for body, message in (
        ({"tasks": ["a", "b", "c"]}, "3 tasks are more than this server allows: --apr-max-width 2"),
        ({"tasks": ["a"], "budget": {"tokens": 101}}, "budget tokens=101 is more than this server allows"),
        ({"tasks": ["a"], "budget": {"seconds": 10}}, "--apr-max-seconds 9"),
    ):
        with pytest.raises(apr.BudgetExceeded, match=message):
            parse(limits, prompt="p", **body)


def test_texts_that_no_context_holds_are_refused_before_they_are_encoded():
    parser = OptionsParser(
        NO_LIMITS, apr.ByteTokenizer(), context_length=10, vocab_size=300, max_token_chars=4
    )
    long = "x" * 41
    for body, name in (
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": long}]}], "tasks": ["a"]},
            "the messages",
        ),
        ({"prompt": "p", "tasks": ["a", long]}, "task 2"),
        ({"prompt": "p", "tasks": ["a"], "merge": long}, "merge"),
    ):
        with pytest.raises(
            apr.BudgetExceeded, match=rf"{name}: the text has \d+ characters, expected at most 40"
        ):
            check_text_size(parse(**body), parser)
    check_text_size(parse(prompt="p", tasks=["x" * 40]), parser)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}'])
def test_a_body_that_is_no_object_is_refused(body: bytes):
    with pytest.raises(apr.AprError, match="the body"):
        ForkRequest.from_json(body)


def test_a_request_that_fits_its_schema_is_refused_only_for_its_values():
    wrong_type = re.compile(
        "expected (a string|true or false|an object|a number from|a whole number|one of prompt|a list)"
    )
    operation = schemathesis.openapi.from_dict(document())["/apr/fork"]["POST"]

    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def check(case: schemathesis.Case) -> None:
        refusal = ""
        try:
            parse(**whole_numbers(case.body))
        except apr.AprError as error:
            refusal = str(error)
        assert not wrong_type.search(refusal), refusal

    check()
