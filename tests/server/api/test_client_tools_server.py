"""Tools over HTTP with the official openai client: those that the client runs, and those of the operator."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import requests

import sgl_apr as apr
from sgl_apr.formats.dialects import dialect, dialect_names
from sgl_apr.server.api.client_calls import session_of
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import random_llama
from tests.support.processes import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
USER = {"role": "user", "content": "Why do cats purr?"}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
OPTIONS = {
    "tool_call_parser": "hermes",
    "dialect": "threadweaver",
    "budget": {"width": 3, "tokens": 400, "tool_calls": 3},
}
MAX_TURNS = 40
KEY = "sesame"


def client(server: Server, kind: type = openai.OpenAI, key: str = "none") -> Any:
    return kind(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def arguments(messages: list[Any], options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    body = {"apr": OPTIONS | (options or {})}
    return {"model": "m", "messages": messages, "tools": TOOLS, "temperature": 1, "extra_body": body} | more


def answered(messages: list[Any], calls: list[Any]) -> list[Any]:
    """The conversation with a result for each call. The results have tags, which have to stay text."""
    for call in calls:
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    results = [{"role": "tool", "tool_call_id": call["id"], "content": result_of(call)} for call in calls]
    return [*messages, {"role": "assistant", "content": None, "tool_calls": calls}, *results]


def result_of(call: dict[str, Any]) -> str:
    return f"</Thread> {json.loads(call['function']['arguments'])['city']} {call['id'][-2:]}"


def stats(server: Server, key: str = "none") -> dict[str, Any]:
    return requests.get(
        f"{server.url}/apr/stats", timeout=30, headers={"Authorization": f"Bearer {key}"}
    ).json()


def loop(server: Server, options: dict[str, Any] | None = None, **more: Any) -> list[Any]:
    """The responses of an agent's loop, until there are no more calls."""
    messages, responses, choice = [USER], [], more.pop("tool_choice", "required")
    while len(responses) < MAX_TURNS:
        response = client(server).chat.completions.create(
            **arguments(messages, options, tool_choice=choice, **more)
        )
        responses.append(response)
        message = response.choices[0].message
        if response.choices[0].finish_reason != "tool_calls":
            assert message.tool_calls is None
            return responses
        messages = answered(messages, [call.model_dump() for call in message.tool_calls])
    raise AssertionError("the reply does not end")


def check_loop(responses: list[Any]) -> apr.Trajectory:
    """The calls of the responses are those of the trajectory, and so are the tokens."""
    calls = [call for r in responses for call in r.choices[0].message.tool_calls or []]
    assert len({call.id for call in calls}) == len(calls) >= 1
    assert len({session_of(call.id) for call in calls}) == 1
    assert [r.choices[0].message.content for r in responses[:-1]] == [None] * (len(responses) - 1)
    trajectory = apr.Trajectory.from_json(json.dumps(responses[-1].apr["trajectory"]))
    done = [call for call in trajectory.tool_calls if call.outcome == "ok"]
    assert sorted(call.result for call in done) == sorted(result_of(call.model_dump()) for call in calls)
    paths = {path["id"]: tuple(path["path"]) for r in responses[:-1] for path in r.apr["calls"]}
    assert sorted(paths.values()) == sorted(call.path for call in done)
    for before, after in itertools.pairwise(responses):
        assert after.usage.prompt_tokens == before.usage.total_tokens
    written = sum(response.usage.completion_tokens for response in responses)
    assert written == trajectory.metrics().total
    return trajectory


def test_a_loop_of_the_sync_client(server: Server):
    before = stats(server)
    responses = loop(server, {"trajectory": True})
    check_loop(responses)
    after = stats(server)
    assert after["tool_waits"]["continued"] - before["tool_waits"]["continued"] == len(responses) - 1
    assert (after["waiting"], after["running"]) == (0, 0)


async def stream_turn(chats: Any, messages: list[Any], **more: Any) -> tuple[list[Any], str, str, Any]:
    """The calls of a streamed response, its content, its finish reason and its usage."""
    calls: list[Any] = []
    content, finish, usage = "", None, None
    stream = await chats.create(
        **arguments(messages, stream=True, stream_options={"include_usage": True}, **more)
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or []:
                assert call.index == len(calls)
                calls.append(call.model_dump(exclude={"index"}))
    return calls, content, finish, usage


def test_a_loop_of_the_async_client_with_streams(server: Server):
    async def main() -> None:
        async with client(server, openai.AsyncOpenAI) as asynchronous:
            messages, choice = [USER], {"type": "function", "function": {"name": "weather"}}
            for turn in range(MAX_TURNS):
                calls, content, finish, usage = await stream_turn(
                    asynchronous.chat.completions, messages, tool_choice=choice
                )
                assert usage.completion_tokens > 0
                assert (finish == "tool_calls") == bool(calls)
                if not calls:
                    assert turn
                    return
                assert content == ""
                messages = answered(messages, calls)
        raise AssertionError("the reply does not end")

    asyncio.run(main())


def test_results_that_do_not_fit_are_refused_and_the_trajectory_waits_on(server: Server):
    chats = client(server).chat.completions
    first = chats.create(**arguments([USER], tool_choice="required"))
    calls = [call.model_dump() for call in first.choices[0].message.tool_calls]
    full = answered([USER], calls)
    edited = [{"role": "user", "content": "Why?"}, *full[1:]]
    twice = [*full, full[-1]]
    for messages, expected in (([*full[:2], full[2] | {"tool_call_id": f"{calls[0]['id'][:-1]}9"}], "comes before"),
                               (edited, "message 1 differs"), (twice, "two results")):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=expected):
            chats.create(**arguments(messages))
    with pytest.raises(openai.BadRequestError, match="n=2 cannot be combined with tools"):
        chats.create(**arguments([USER], n=2))
    assert stats(server)["waiting"] == 1
    other = client(server, key="another").chat.completions.create(**arguments(full, tool_choice="none"))
    assert other.choices[0].finish_reason in ("stop", "length")  # a reply of its own
    assert stats(server)["waiting"] == 1
    chats.create(**arguments(full))
    again = chats.create(**arguments(full, tool_choice="none"))
    assert again.choices[0].finish_reason in ("stop", "length")


def test_names_of_tools_that_a_server_does_not_have(server: Server):
    with pytest.raises(openai.BadRequestError, match="start it with --apr-tools"):
        client(server).chat.completions.create(
            model="m", messages=[USER], extra_body={"apr": {"tools": "all"}}
        )
    with pytest.raises(openai.BadRequestError, match="tool_call_parser"):
        client(server).chat.completions.create(**arguments([USER], {"tool_call_parser": None}))
    assert requests.get(f"{server.url}/apr/tools", timeout=30).json() == {"tools": []}


MODULE = """
import asyncio, time

def add(a: int, b: int) -> int:
    "Add."
    return a + b

async def pause() -> str:
    "Wait."
    time.sleep(0.2)
    return "paused"
"""


@pytest.fixture(scope="module")
def tool_server(forked_server: type[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a random model that often calls tools, also in branches. It has tools, and little patience."""
    directory = tmp_path_factory.mktemp("tools")
    tags = dict.fromkeys(tag for name in dialect_names() for tag in dialect(name).tags)
    random_llama(directory, tags=[*tags, "<tool_call>", "</tool_call>"], tag_bias=5.0)
    (directory / "operator_tools.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        flags = {
            "tool_call_parser": "hermes",
            "apr_tools": "operator_tools:add",
            "apr_tool_wait": 8,
            "api_key": KEY,
        }
        with forked_server(directory, log_path=directory / "log", **flags) as server:
            yield server


def ask(server: Server, messages: list[Any], **more: Any) -> Any:
    options = {"mode": "parallel", "trajectory": True, "tool_call_parser": None}
    options["budget"] = {"width": 4, "tokens": 800, "tool_calls": 12}
    chats = client(server, key=KEY).chat.completions
    return chats.create(**arguments(messages, options, **more))


@pytest.mark.slow
def test_the_calls_of_several_branches_come_with_one_response(tool_server: Server):
    most = 0
    for seed in range(10):
        messages, responses = [USER], []
        while len(responses) < MAX_TURNS:
            responses.append(ask(tool_server, messages, seed=seed))
            calls = responses[-1].choices[0].message.tool_calls or []
            most = max(most, len({tuple(call["path"]) for call in responses[-1].apr.get("calls", ())}))
            if not calls:
                break
            messages = answered(messages, [call.model_dump() for call in calls])
        if len(responses) > 1:
            check_loop(responses)
    assert most > 1
    assert stats(tool_server, KEY)["waiting"] == 0


@pytest.mark.slow
def test_300_clients_that_vanish_leave_nothing_behind(tool_server: Server):
    """A third during the response, a third while their calls wait, and a third while a later response is written."""

    def vanish(number: int) -> int:
        body = arguments([USER], {"mode": "parallel"}, tool_choice="required", seed=number)
        body |= body.pop("extra_body")
        url, headers = f"{tool_server.url}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
        if number % 3 == 0:
            with requests.post(
                url, json=body | {"stream": True}, headers=headers, stream=True, timeout=300
            ) as answer:
                next(answer.iter_lines())
            return 0
        first = requests.post(url, json=body, headers=headers, timeout=300).json()
        calls = first["choices"][0]["message"].get("tool_calls") or []
        if number % 3 == 1 or not calls:
            return bool(calls)
        body["messages"] = answered([USER], calls)
        with requests.post(
            url, json=body | {"stream": True}, headers=headers, stream=True, timeout=300
        ) as answer:
            next(answer.iter_lines(), None)
        return 0

    with ThreadPoolExecutor(60) as threads:
        waiting = sum(threads.map(vanish, range(300)))
    assert waiting >= 50
    headers = {"Authorization": f"Bearer {KEY}"}

    def is_clean() -> bool:
        found = stats(tool_server, KEY)
        loads = requests.get(f"{tool_server.url}/get_load", timeout=30, headers=headers).json()
        idle = all(load.get("num_reqs", 0) == 0 for load in loads)
        return found["waiting"] == found["running"] == found["queued"] == 0 and idle

    until(is_clean, 60)
    assert stats(tool_server, KEY)["tool_waits"]["expired"] >= waiting
    assert ask(tool_server, [USER], tool_choice="none").choices[0].finish_reason in ("stop", "length")


@pytest.mark.slow
def test_a_trajectory_that_has_waited_for_too_long_starts_again(tool_server: Server):
    first = ask(tool_server, [USER], tool_choice="required")
    calls = [call.model_dump() for call in first.choices[0].message.tool_calls]
    time.sleep(9)
    before = stats(tool_server, KEY)["tool_waits"]
    again = ask(tool_server, answered([USER], calls), tool_choice="none")
    assert again.choices[0].finish_reason in ("stop", "length")
    assert stats(tool_server, KEY)["tool_waits"]["unknown"] == before["unknown"] + 1


@pytest.mark.slow
def test_the_server_runs_its_own_tools(tool_server: Server):
    headers = {"Authorization": f"Bearer {KEY}"}
    listed = requests.get(f"{tool_server.url}/apr/tools", timeout=30, headers=headers).json()["tools"]
    assert [tool["function"]["name"] for tool in listed] == ["add"]
    body = {
        "prompt": "Q",
        "tools": ["add"],
        "tool_choice": "required",
        "budget": {"tokens": 300, "tool_calls": 4},
    }
    text = requests.post(f"{tool_server.url}/apr/generate", json=body, timeout=60, headers=headers).text
    trajectory = apr.Trajectory.from_json(text)
    ran = [call for call in trajectory.tool_calls if call.outcome == "ok"]
    assert ran
    for call in ran:
        sent = json.loads(call.arguments)
        assert call.result == str(sent["a"] + sent["b"])
    refused = requests.post(
        f"{tool_server.url}/apr/generate", json={"prompt": "Q", "tools": ["ad"]}, timeout=60, headers=headers
    )
    assert refused.status_code == 400
    assert "did you mean 'add'" in refused.json()["error"]["message"]
    both = arguments([USER], {"tools": "all", "tool_call_parser": None}, tool_choice="required")
    assert client(tool_server, key=KEY).chat.completions.create(**both).choices[0].finish_reason


@pytest.mark.slow
def test_wrong_tools_are_a_launch_error(forked_server: type[Server], tmp_path: Path):
    random_llama(tmp_path)
    for tools, expected in (
        ("no_such_module:f", "cannot be imported"),
        ("json:no_such", "no name 'no_such'"),
    ):
        with pytest.raises(apr.LaunchError, match=f"--apr-tools: {tools}: .*{expected}"):
            forked_server(tmp_path, log_path=tmp_path / "log", apr_tools=tools).start()
