"""Tools over HTTP with the official openai client: those that the client runs, and those of the operator."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import requests

import sgl_apr as apr
from sgl_apr.server.api.tools.client_calls import session_of
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
    "dialect": "threadweaver",
    "budget": {"width": 3, "tokens": 250, "tool_calls": 3},
}
MAX_TURNS = 40


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


def stats(server: Server) -> dict[str, Any]:
    return requests.get(f"{server.url}/apr/stats", timeout=30).json()


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
    results = {result_of(call.model_dump()) for call in calls}
    assert len(done) == len(calls)
    assert {call.result for call in done if not call.truncated} <= results  # no room for more
    paths = {path["id"]: tuple(path["path"]) for r in responses[:-1] for path in r.apr["calls"]}
    assert sorted(paths.values()) == sorted(call.path for call in done)
    for before, after in itertools.pairwise(responses):
        assert after.usage.prompt_tokens == before.usage.total_tokens
    written = sum(response.usage.completion_tokens for response in responses)
    assert written == trajectory.metrics().total
    return trajectory


def test_a_loop_of_the_sync_client(tool_server: Server):
    before = stats(tool_server)
    responses = loop(tool_server, {"trajectory": True})
    check_loop(responses)
    after = stats(tool_server)
    assert after["tool_waits"]["continued"] - before["tool_waits"]["continued"] == len(responses) - 1
    assert (after["waiting"], after["running"]) == (before["waiting"], 0)


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


def test_a_loop_of_the_async_client_with_streams(tool_server: Server):
    async def main() -> None:
        async with client(tool_server, openai.AsyncOpenAI) as asynchronous:
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


def test_results_that_do_not_fit_are_refused_and_the_trajectory_waits_on(tool_server: Server):
    chats = client(tool_server).chat.completions
    first = chats.create(**arguments([USER], tool_choice="required"))
    calls = [call.model_dump() for call in first.choices[0].message.tool_calls]
    full = answered([USER], calls)
    twice = [*full, full[-1]]
    for messages, expected in (([*full[:2], full[2] | {"tool_call_id": f"{calls[0]['id'][:-1]}9"}], "comes before"),
                               (twice, "two results")):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=expected):
            chats.create(**arguments(messages))
    with pytest.raises(openai.BadRequestError, match="n=2 cannot be combined with tools"):
        chats.create(**arguments([USER], n=2))
    waiting = stats(tool_server)["waiting"]
    assert waiting >= 1
    other = client(tool_server, key="another").chat.completions.create(**arguments(full, tool_choice="none"))
    assert other.choices[0].finish_reason in ("stop", "length")  # a reply of its own
    assert stats(tool_server)["waiting"] == waiting
    chats.create(**arguments(full))
    again = chats.create(**arguments(full, tool_choice="none"))
    assert again.choices[0].finish_reason in ("stop", "length")


def check_sum(call: dict[str, Any]) -> None:
    """Check the result of a call of `add`. The tokens that are left may hold only the beginning of a long one."""
    sent = json.loads(call["arguments"])
    total = str(sent["a"] + sent["b"])
    if call["truncated"]:
        assert total.startswith(call["result"].partition("\n[cut: ")[0])
    else:
        assert call["result"] == total


def test_tools_of_the_server_run_there(tool_server: Server):
    (listed,) = requests.get(f"{tool_server.url}/apr/tools", timeout=30).json()["tools"]
    assert listed["function"]["name"] == "add"
    with pytest.raises(openai.BadRequestError, match="did you mean 'add'"):
        client(tool_server).chat.completions.create(**arguments([USER], {"tools": ["ad"]}))
    chats = client(tool_server).chat.completions
    options = {"tools": "all", "trajectory": True, "budget": {"tokens": 500, "tool_calls": 3, "width": 2}}
    named = {"type": "function", "function": {"name": "add"}}
    response = chats.create(**arguments([USER], options, tools=None, tool_choice=named))
    assert response.choices[0].finish_reason in ("stop", "length")
    calls = [call for call in response.apr["trajectory"]["tool_calls"] if call["outcome"] == "ok"]
    assert calls
    for call in calls:
        check_sum(call)


def test_tasks_of_a_fork_call_tools_of_the_server(tool_server: Server):
    tasks = [
        {
            "prompt": "Add.",
            "tools": ["add"],
            "tool_choice": "add",
            "budget": {"tool_calls": 1},
            "max_tokens": 150,
        },
        {"prompt": "Do not.", "max_tokens": 5},
    ]
    body = {"messages": [USER], "tasks": tasks, "temperature": 1, "budget": {"tokens": 400}}
    first, second = requests.post(f"{tool_server.url}/apr/fork", json=body, timeout=60).json()["results"]
    (call,) = first["tool_calls"]
    assert call["outcome"] == "ok"
    check_sum(call)
    assert second["tool_calls"] == []
    body["tasks"] = [{"prompt": "Add.", "tools": ["ad"]}]
    refused = requests.post(f"{tool_server.url}/apr/fork", json=body, timeout=60)
    assert refused.status_code == 400
    assert "did you mean 'add'" in refused.json()["error"]["message"]


def ask(server: Server, messages: list[Any], **more: Any) -> Any:
    """A response that may have calls of several branches."""
    options = {"mode": "parallel", "trajectory": True}
    options["budget"] = {"width": 4, "tokens": 1200, "tool_calls": 40}
    chats = client(server).chat.completions
    return chats.create(**arguments(messages, options, **more))


@pytest.mark.slow
def test_the_calls_of_several_branches_come_with_one_response(tool_server: Server):
    most = 0
    for seed in range(12):
        if most > 1:
            break
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


@pytest.mark.slow
def test_300_clients_that_vanish_leave_nothing_behind(tool_server: Server):
    """A third during the response, a third while their calls wait, and a third while a later response is written."""

    def vanish(number: int) -> int:
        options = {"mode": "parallel", "budget": {"tokens": 250, "tool_calls": 3, "width": 2}}
        body = arguments([USER], options, tool_choice="required", seed=number)
        body |= body.pop("extra_body")
        url = f"{tool_server.url}/v1/chat/completions"
        if number % 3 == 0:
            with requests.post(url, json=body | {"stream": True}, stream=True, timeout=300) as answer:
                next(answer.iter_lines())
            return 0
        first = requests.post(url, json=body, timeout=300).json()
        calls = first["choices"][0]["message"].get("tool_calls") or []
        if number % 3 == 1 or not calls:
            return bool(calls)
        body["messages"] = answered([USER], calls)
        with requests.post(url, json=body | {"stream": True}, stream=True, timeout=300) as answer:
            next(answer.iter_lines(), None)
        return 0

    with ThreadPoolExecutor(60) as threads:
        waiting = sum(threads.map(vanish, range(300)))
    assert waiting >= 30

    def is_clean() -> bool:
        found = stats(tool_server)
        (load,) = requests.get(f"{tool_server.url}/v1/loads", timeout=30).json()["loads"]
        idle = load["num_running_reqs"] == load["num_waiting_reqs"] == 0
        return found["waiting"] == found["running"] == found["queued"] == 0 and idle

    until(is_clean, 60)
    assert stats(tool_server)["tool_waits"]["expired"] >= waiting
    assert ask(tool_server, [USER], tool_choice="none").choices[0].finish_reason in ("stop", "length")


@pytest.mark.slow
def test_a_trajectory_that_has_waited_for_too_long_starts_again(tool_server: Server):
    first = ask(tool_server, [USER], tool_choice="required")
    calls = [call.model_dump() for call in first.choices[0].message.tool_calls]
    time.sleep(21)
    before = stats(tool_server)["tool_waits"]
    again = ask(tool_server, answered([USER], calls), tool_choice="none")
    assert again.choices[0].finish_reason in ("stop", "length")
    assert stats(tool_server)["tool_waits"]["unknown"] == before["unknown"] + 1


@pytest.mark.slow
def test_wrong_tools_are_a_launch_error(forked_server: type[Server], tmp_path: Path):
    random_llama(tmp_path)
    for tools, expected in (
        ("no_such_module:f", "cannot be imported"),
        ("json:no_such", "no name 'no_such'"),
    ):
        with pytest.raises(apr.LaunchError, match=f"--apr-tools: {tools}: .*{expected}"):
            forked_server(tmp_path, log_path=tmp_path / "log", apr_tools=tools).start()


@pytest.mark.slow
def test_a_stock_mcp_server_answers_calls_of_a_model(tool_server: Server):
    """In a trajectory, and from the command line. A random model does not know a time zone, so the schema has two."""
    command = str(Path(sys.executable).with_name("mcp-server-time"))

    async def main() -> apr.Trajectory:
        async with (
            apr.mcp_tools(command=[command], include=["get_current_time"]) as tools,
            await apr.HttpEngine.connect(tool_server.url) as engine,
        ):
            zones = {"timezone": {"enum": ["Europe/Oslo", "Mars"]}}
            schema = {"type": "object", "properties": zones, "required": ["timezone"]}
            tools = [replace(tool, parameters=schema) for tool in tools]
            budget = {"tokens": 600, "tool_calls": 3, "width": 2}
            return await apr.areason(
                engine, [USER], "threadweaver", tools=tools, tool_choice="required", budget=budget
            )

    calls = asyncio.run(main()).tool_calls
    outcomes = {call.outcome for call in calls}
    assert outcomes & {"ok", "error"}
    for call in calls:
        if call.truncated:  # there was no room for more
            continue
        if call.outcome == "ok":
            assert '"timezone": "Europe/Oslo"' in call.result
        elif call.outcome == "error":
            assert "Invalid timezone" in call.result
    argv = [
        sys.executable,
        "-m",
        "sgl_apr.cli.main",
        "run",
        "What time is it?",
        "--url",
        tool_server.url,
        "--json",
    ]
    argv += ["--mcp", command, "--budget", "tokens=900,tool_calls=6,width=3", "--dialect", "threadweaver"]
    ran = subprocess.run([*argv, "--seed", "1"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    called = apr.Trajectory.from_json(ran.stdout).tool_calls
    assert {call.name for call in called} <= {"get_current_time", "convert_time"}
