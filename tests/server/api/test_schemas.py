"""The schemas of /openapi.json agree with what is checked, and with what a real server sends."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import jsonschema
import pytest
import requests
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

import sgl_apr as apr
from sgl_apr.server.api.config import ApiConfig
from sgl_apr.server.api.install import make_router
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.server.api.options import OPTION_NAMES, OptionsParser, ReasonRequest
from sgl_apr.server.api.schemas import describe_openapi, option_schemas
from sgl_apr.server.api.worker_group import check_group_request
from sgl_apr.server.launch.launcher import Server
from tests.server.api.test_requests import BAD_SAMPLING

VOCABULARY = 300
PARSER = OptionsParser(RequestLimits(), apr.ByteTokenizer(), 2000, VOCABULARY)


def document() -> dict[str, Any]:
    app = FastAPI()
    describe_openapi(app)
    app.include_router(make_router(lambda: None))  # type: ignore[arg-type, return-value]
    return app.openapi()


def validator(openapi: dict[str, Any], name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", **openapi})


def test_every_option_is_described():
    schemas = option_schemas()
    assert set(schemas) == set(OPTION_NAMES)
    undescribed = {name for name, schema in schemas.items() if "description" not in schema}
    assert undescribed <= {"temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
                           "repetition_penalty", "logit_bias", "lora_path", "cache_salt", "extra_key", "priority"}  # fmt: skip


def whole_numbers(value: Any) -> Any:
    """The value with 1 for 1.0, which is an integer in JSON Schema."""
    if isinstance(value, dict):
        return {name: whole_numbers(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [whole_numbers(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def test_a_request_that_matches_its_schema_is_refused_only_for_its_values():
    """Values of the right type are taken, or refused because of the dialect, the vocabulary or another option."""
    wrong_type = re.compile(
        "expected (a string|true or false|an object|a number from|a whole number|one prompt)"
    )
    operation = schemathesis.openapi.from_dict(document())["/apr/generate"]["POST"]

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def check(case: schemathesis.Case) -> None:
        refusal = ""
        try:
            PARSER.parse(ReasonRequest.from_json(json.dumps(whole_numbers(case.body)).encode()))
        except apr.AprError as error:
            refusal = str(error)
        assert not wrong_type.search(refusal), refusal

    check()


@pytest.mark.parametrize(("sampling", "message"), BAD_SAMPLING, ids=str)
def test_a_value_that_is_refused_does_not_match_its_schema(sampling: dict, message: str):
    ((name, value),) = sampling.items()
    if (
        "nan" in str(value)
        or "inf" in str(value)
        or (isinstance(value, dict) and not isinstance(next(iter(value)), str))
    ):
        pytest.skip("JSON has no such value")
    if "token id from" in message and str(next(iter(value))).isascii():
        pytest.skip("depends on the vocabulary")
    assert not jsonschema.Draft202012Validator(option_schemas()[name]).is_valid(value)


@pytest.mark.parametrize(
    ("body", "is_valid"),
    [
        ({"prompt": "Q"}, True),
        ({"prompt": "Q", "input_ids": None, "budget": {"tokens": 5, "seconds": None}, "stream": True}, True),
        ({"input_ids": [1, 2], "dialect": "spawn", "policy": "quorum:2"}, True),
        ({"prompt": "Q", "input_ids": [1]}, False),
        ({}, False),
        ({"prompt": ""}, False),
        ({"prompt": "Q", "widht": 3}, False),
        ({"prompt": "Q", "budget": {"width": 1}}, False),
        ({"prompt": "Q", "policy": "some"}, False),
        ({"prompt": "Q", "mode": "fast"}, False),
        ({"prompt": "Q", "retry": {"attempts": 11}}, False),
    ],
)
def test_the_schema_of_a_request_agrees_with_the_checks(body: dict, is_valid: bool):
    assert validator(document(), "AprGenerateRequest").is_valid(body) == is_valid
    try:
        PARSER.parse(ReasonRequest.from_json(json.dumps(body).encode()))
    except apr.AprError:
        assert not is_valid
    else:
        assert is_valid


@pytest.mark.parametrize(
    ("group", "is_valid"),
    [
        ({"kind": "group_think", "headers": ["A:", "B:"]}, True),
        ({"kind": "hogwild", "headers": ["A:"], "step_end": "\n\n"}, True),
        ({"kind": "hogwild", "headers": ["A:"], "step_end": None}, True),
        ({"kind": "crowd", "headers": ["A:"]}, False),
        ({"kind": "group_think", "headers": []}, False),
        ({"kind": "group_think", "headers": ["A:"] * 65}, False),
        ({"kind": "group_think", "headers": ["A:", ""]}, False),
        ({"kind": "group_think", "headers": "A:"}, False),
        ({"kind": "hogwild", "headers": ["A:"], "step_end": ""}, False),
        ({"kind": "hogwild", "headers": ["A:"], "step_end": "x" * 65}, False),
        ({"kind": "group_think", "headers": ["A:"], "workers": 1}, False),
        ({"headers": ["A:"]}, False),
        ({"kind": "group_think"}, False),
        (["A:"], False),
    ],
)
def test_the_schema_of_a_group_agrees_with_the_checks(group: object, is_valid: bool):
    body = {"prompt": "Q", "group": group}
    assert validator(document(), "AprGenerateRequest").is_valid(body) == is_valid
    request = ReasonRequest.from_json(json.dumps(body).encode())
    try:
        asyncio.run(check_group_request(PARSER, ApiConfig(), request))
    except apr.AprError:
        assert not is_valid
    else:
        assert is_valid


@pytest.mark.server
def test_the_responses_of_a_server_match_their_schemas(server: Server):
    openapi = requests.get(f"{server.url}/openapi.json", timeout=30).json()
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        assert "apr" in openapi["components"]["schemas"][name]["properties"]
    body = {"prompt": "Q: ", "mode": "parallel", "dialect": "threadweaver", "budget": {"tokens": 200}}
    validator(openapi, "AprGenerateRequest").validate(body)
    trajectory = requests.post(f"{server.url}/apr/generate", json=body, timeout=60).json()
    validator(openapi, "AprTrajectory").validate(trajectory)
    events = requests.post(f"{server.url}/apr/generate", json={**body, "stream": True}, timeout=60).text
    kinds = set()
    for line in events.split("\n\n")[:-2]:
        event = json.loads(line.removeprefix("data: "))
        validator(openapi, "AprEvent").validate(event)
        kinds.add(event["event"])
    assert {"delta", "forked", "span_finished", "request_finished", "branch_ended", "joined", "done"} <= kinds
    for path, name in (
        ("/apr/dialects", "AprDialects"),
        ("/apr/tools", "AprTools"),
        ("/apr/stats", "AprStats"),
    ):
        validator(openapi, name).validate(requests.get(server.url + path, timeout=30).json())
    error = requests.post(f"{server.url}/apr/generate", json={"prompt": ""}, timeout=30)
    assert error.status_code == 400
    validator(openapi, "AprError").validate(error.json())
