"""A group of workers after any prompt: what is sent, what is refused, and limits of an operator."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.methods import decode_group
from sgl_apr.server.api.config import ApiConfig
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.server.api.options import OptionsParser, ReasonRequest
from sgl_apr.server.api.worker_group import CheckedGroup, check_group_request


def engine_with(*kinds: Any) -> apr.ScriptedEngine:
    return apr.ScriptedEngine(lambda request, prompt: prompt[-2] * 3, groups=kinds)


def test_it_decodes_until_all_workers_have_ended():
    engine = engine_with("hogwild")
    trajectory = asyncio.run(
        decode_group(engine, "Q", "hogwild", ["A:", "B:"], step_end="|", budget={"tokens": 20})
    )
    (group,) = engine.group_requests
    assert [bytes(r.input_ids) for r in group.requests] == [b"QA:", b"QB:"]
    assert (group.kind, group.step_end) == ("hogwild", "|")
    assert [b.text for b in trajectory.blocks[0].branches] == ["AAA", "BBB"]
    assert trajectory.dialect == "hogwild"
    ids = asyncio.run(decode_group(engine_with("hogwild"), [1, 2], "hogwild", ["A:"]))
    assert ids.spans[0].token_ids == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("crowd", ["A"]), "expected group_think or hogwild"),
        (("hogwild", "A"), "expected a list of 1 to 64 texts"),
        (("hogwild", []), "expected a list of 1 to 64 texts"),
        (("hogwild", ["A", ""]), "header 2 is '', expected text"),
        (("hogwild", ["A", 3]), "header 2 is 3, expected text"),
    ],
)
def test_arguments_are_checked(arguments: tuple, message: str):
    with pytest.raises(apr.AprError, match=message):
        asyncio.run(decode_group(engine_with("hogwild"), "Q", *arguments))


def test_who_cannot_do_it_refuses_it():
    with pytest.raises(apr.AprError, match="only for hogwild"):
        asyncio.run(decode_group(engine_with("group_think"), "Q", "group_think", ["A"], step_end="|"))
    with pytest.raises(apr.UnsupportedEngine, match="does not decode groups of kind hogwild"):
        asyncio.run(decode_group(engine_with("group_think"), "Q", "hogwild", ["A"]))
    with pytest.raises(apr.AprError, match="a method has a fixed structure"):
        asyncio.run(decode_group(engine_with("hogwild"), "Q", "hogwild", ["A"], mode="parallel"))


def checked(body: dict, limits: RequestLimits | None = None, **defaults: Any) -> CheckedGroup:
    """What a server with these limits and default options makes of a body of `/apr/generate`."""
    config = ApiConfig(limits=limits or RequestLimits(), default_options=defaults)
    parser = OptionsParser(config.limits, apr.ByteTokenizer(), 2000, 257)
    request = ReasonRequest.from_json(json.dumps({"prompt": "Q", **body}).encode())
    return asyncio.run(check_group_request(parser, config, request))


GROUP = {"group": {"kind": "group_think", "headers": ["A:", "B:"]}}


def test_a_request_to_a_server():
    group = checked(
        {**GROUP, "budget": {"seconds": 3}, "temperature": 0.5},
        RequestLimits(tokens=300),
        mode="parallel",
        budget={"width": 3},
    )
    assert (group.prompt, group.kind, group.headers, group.step_end) == (
        (81,),
        "group_think",
        ("A:", "B:"),
        None,
    )
    assert group.options["temperature"] == 0.5
    assert group.options["budget"] == apr.Budget(tokens=300, seconds=3, width=3)
    assert "mode" not in group.options, "the operator's defaults of other trajectories"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({**GROUP, "mode": "parallel"}, "no option 'mode'"),
        ({**GROUP, "dialect": "spawn"}, "no option 'dialect'"),
        ({**GROUP, "tools": "all"}, "cannot wait for the result of a tool"),
        ({**GROUP, "temperature": -1}, "temperature"),
        ({**GROUP, "retry": {"attempts": 11}}, "expected at most 10"),
        ({**GROUP, "budget": {"tokens": 301}}, "--apr-max-tokens 300"),
        (
            {"group": {"kind": "group_think", "headers": ["x"] * 5}},
            "5 workers are more than this server allows",
        ),
        (
            {"group": {"kind": "group_think", "headers": ["x" * 600_000]}},
            "the headers have 600000 characters",
        ),
        ({"group": {"kind": "group_think", "header": ["x"]}}, "no option 'header', did you mean 'headers'"),
        ({"group": 3}, "group=3"),
        ({**GROUP, "prompt": ""}, "expected one prompt"),
    ],
)
def test_what_a_server_refuses(body: dict, message: str):
    with pytest.raises(apr.AprError, match=message):
        checked(body, RequestLimits(tokens=300, width=4))
