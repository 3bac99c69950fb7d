"""Responses of trajectories whose clients run tools, on a scripted engine: calls of branches, streams, usage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

import sgl_apr as apr
from sgl_apr.runtime.tools.tool import Tool
from sgl_apr.server.api.config import ApiConfig
from sgl_apr.server.api.http_streams import event_stream, run_until_disconnect
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.server.api.openai.request import OpenAIRequest
from sgl_apr.server.api.openai.response import OpenAIResponseBuilder
from sgl_apr.server.api.openai.response_options import ResponseOptions
from sgl_apr.server.api.options import ReasonRequest
from sgl_apr.server.api.service import TrajectoryService
from sgl_apr.server.api.tools.response import turn_chunks, turn_completion
from sgl_apr.server.api.tools.turns import find_turn
from tests.runtime.tools.scripted_tools import FORK, JOINED, call, engine

USER = {"role": "user", "content": "Q"}
AFTER_RESULT = "\n</tool_response>\n"
SCRIPT = {
    "Q: ": "Let us see. " + FORK,
    "<Thread>\n1:": " look " + call("search", q="left") + call("search", q="low"),
    "<Thread>\n2:": " look " + call("search", q="right"),
    AFTER_RESULT: " found\n</Thread>",
    "</Thread>\n": JOINED,
}
TOOL = Tool("search", "Find.", {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]})


class ScriptedService(TrajectoryService):
    """The service of a server whose engine is scripted."""

    def __init__(self, scripted: apr.ScriptedEngine, limits: RequestLimits) -> None:
        model = SimpleNamespace(context_len=100_000, vocab_size=1000)
        values = {"tool_call_parser": "qwen25"}
        manager = SimpleNamespace(served_model_name="m", config_value=values.get, model_config=model)
        super().__init__(manager, ApiConfig(limits))
        self._engine: Any = scripted


def parsed_request(response: ResponseOptions, *, stream: bool = False) -> OpenAIRequest:
    options = {"dialect": "threadweaver", "budget": {"tokens": 3000}, "tool_call_parser": "qwen25"}
    return OpenAIRequest(
        ReasonRequest("Q: ", options, stream, request_options={"tools": (TOOL,)}), response, runs_tools=True
    )


class Client:
    """Sends chat requests to a service, streamed or not, and returns message, finish reason, usage and `apr`."""

    def __init__(self, service: ScriptedService, *, stream: bool, **response: Any) -> None:
        self.service, self.stream = service, stream
        self.response = ResponseOptions(include_usage=stream, include_trajectory=True, **response)
        self.reasoning = self.content = ""

    async def send(self, messages: list[Any]) -> tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]:
        parsed = parsed_request(self.response)
        raw: Any = SimpleNamespace(headers={})
        turn = await find_turn(self.service, raw, {"messages": messages}, parsed)
        assert turn is not None
        builder = OpenAIResponseBuilder("m", True, self.response)
        if self.stream:
            chunks = [chunk async for chunk in turn_chunks(builder, *turn)]
            message, finish, usage, summary = assemble(chunks)
        else:
            completion = await turn_completion(builder, *turn)
            (choice,) = completion["choices"]
            message, finish = choice["message"], choice["finish_reason"]
            usage, summary = completion["usage"], completion["apr"]
        self.reasoning += message["reasoning_content"] or ""
        self.content += message["content"] or ""
        return message, finish, usage, summary

    async def loop(self, run: Callable[[str], str]) -> tuple[list[Any], list[dict[str, Any]], dict[str, Any]]:
        """The calls of each response, the usages, and `apr` of the last response."""
        messages, turns, usages = [USER], [], []
        while True:
            message, finish, usage, summary = await self.send(messages)
            usages.append(usage)
            if finish != "tool_calls":
                return turns, usages, summary
            calls = message["tool_calls"]
            turns.append([(tuple(made["path"]), one["function"]["arguments"])
                          for made, one in zip(summary["calls"], calls, strict=True)])  # fmt: skip
            results = [
                {"role": "tool", "tool_call_id": c["id"], "content": run(c["function"]["arguments"])}
                for c in calls
            ]
            messages = [*messages, {"role": "assistant", "tool_calls": calls}, *reversed(results)]


def assemble(chunks: list[Any]) -> tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]:
    """What a client makes of the chunks of a response."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    finish, summary = "", {}
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    official = state.get_final_completion().choices[0]
    *chunks, last = chunks
    assert (last["choices"], chunks[0]["choices"][0]["delta"]["role"]) == ([], "assistant")
    for chunk in chunks:
        (choice,) = chunk["choices"]
        message["content"] += choice["delta"].get("content") or ""
        message["reasoning_content"] += choice["delta"].get("reasoning_content") or ""
        for made in choice["delta"].get("tool_calls", ()):
            assert made.pop("index") == len(message["tool_calls"])
            message["tool_calls"].append(made)
        finish = choice["finish_reason"] or finish
        summary = chunk.get("apr") or summary
    made = [call.model_dump(include={"id", "type", "function"}) for call in official.message.tool_calls or ()]
    assert [(call["id"], call["function"]["arguments"]) for call in made] == [
        (call["id"], call["function"]["arguments"]) for call in message["tool_calls"]
    ]
    assert (official.finish_reason, official.message.content or "") == (finish, message["content"])
    return message, finish, last["usage"], summary


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_two_branches_come_together_and_their_results_go_where_they_belong(stream: bool):
    async def main() -> None:
        service = ScriptedService(engine(SCRIPT), RequestLimits())
        client = Client(service, stream=stream)
        turns, usages, summary = await client.loop(lambda arguments: f"<Thread>{arguments}")
        assert sorted(turns[0]) == [
            ((1, 1), '{"q": "left"}'), ((1, 1), '{"q": "low"}'), ((1, 2), '{"q": "right"}'),
        ]  # fmt: skip
        assert len(turns) == 1
        trajectory = apr.Trajectory.from_json(apr_json(summary))
        assert client.content == trajectory.answer.lstrip() == "Done."
        assert client.reasoning + client.content == trajectory.text
        assert {(called.path, called.result) for called in trajectory.tool_calls} == {
            ((1, 1), '<Thread>{"q": "left"}'), ((1, 1), '<Thread>{"q": "low"}'), ((1, 2), '<Thread>{"q": "right"}'),
        }  # fmt: skip
        first, second = usages
        assert second["prompt_tokens"] == first["total_tokens"]
        assert first["completion_tokens"] + second["completion_tokens"] == trajectory.metrics().total
        assert service.counters.to_json()["trajectories"]["finished"] == 1
        assert (service.admission.running, service.counters.to_json()["waiting"]) == (0, 0)

    asyncio.run(main())


def apr_json(summary: dict[str, Any]) -> str:
    import json

    return json.dumps(summary["trajectory"])


def test_a_stream_of_all_sequences_has_the_calls_too():
    async def main() -> None:
        service = ScriptedService(engine(SCRIPT), RequestLimits())
        turns, _, summary = await Client(service, stream=True, all_sequences=True).loop(str)
        assert len(turns[0]) == 3
        assert summary["event"] == "done"

    asyncio.run(main())


def test_a_wait_that_is_too_long_ends_the_trajectory_and_its_requests():
    async def main() -> None:
        scripted = engine(SCRIPT)
        service = ScriptedService(scripted, RequestLimits(tool_wait=0.05))
        client = Client(service, stream=False)
        message, finish, _, _ = await client.send([USER])
        assert finish == "tool_calls"
        await asyncio.sleep(0.1)
        counts = service.counters.to_json()
        assert (counts["waiting"], counts["tool_waits"]["expired"]) == (0, 1)
        assert counts["trajectories"]["cancelled"] == 1
        assert scripted.active == set()
        results = [
            {"role": "tool", "tool_call_id": one["id"], "content": "late"} for one in message["tool_calls"]
        ]
        again = [USER, {"role": "assistant", "tool_calls": message["tool_calls"]}, *results]
        fresh, finish, _, _ = await client.send(again)  # as a server that keeps nothing would answer
        assert finish == "tool_calls"
        assert {one["id"] for one in fresh["tool_calls"]}.isdisjoint(
            one["id"] for one in message["tool_calls"]
        )
        await service.close()
        assert scripted.active == set()

    asyncio.run(main())


@pytest.mark.parametrize("clients", [24, pytest.param(300, marks=pytest.mark.slow)])
def test_clients_that_vanish_over_http_leave_nothing(clients: int):
    """During a response, while calls wait, and during the response after the results."""
    scripted = engine(slow_script)
    service = ScriptedService(scripted, RequestLimits(tool_wait=clients / 60))
    app = FastAPI()

    @app.post("/chat")
    async def chat(request: Request) -> Any:
        body = await request.json()
        parsed = parsed_request(ResponseOptions(), stream=body["stream"])
        turn = await find_turn(service, request, body, parsed)
        assert turn is not None
        builder = OpenAIResponseBuilder("m", True, parsed.response)
        if body["stream"]:
            return await event_stream(request.receive, turn_chunks(builder, *turn))
        return JSONResponse(await run_until_disconnect(request.receive, turn_completion(builder, *turn)))

    async def vanish(client: httpx.AsyncClient, url: str, kind: int) -> None:
        async def leave(messages: list[Any]) -> None:
            body = {"messages": messages, "stream": True}
            async with client.stream("POST", url, json=body) as answer:
                await anext(answer.aiter_lines())

        if kind == 0:
            return await leave([USER])
        first = (await client.post(url, json={"messages": [USER], "stream": False})).json()
        (choice,) = first["choices"]
        assert choice["finish_reason"] == "tool_calls"
        if kind == 1:
            return None
        calls = choice["message"]["tool_calls"]
        results = [{"role": "tool", "tool_call_id": c["id"], "content": "r"} for c in calls]
        return await leave([USER, {"role": "assistant", "tool_calls": calls}, *results])

    async def main() -> None:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/chat"
        limits = httpx.Limits(max_connections=60)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            await asyncio.gather(*(vanish(client, url, number % 3) for number in range(clients)))
        counts = service.counters.to_json
        deadline = time.monotonic() + 30
        while counts()["waiting"] or counts()["running"] or scripted.active:
            assert time.monotonic() < deadline, counts()
            await asyncio.sleep(0.02)
        assert counts()["tool_waits"]["expired"] >= clients // 3
        assert counts()["trajectories"]["cancelled"] >= clients // 3
        assert not service.sessions._sessions
        server.should_exit = True
        await serving
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def slow_script(request: apr.Request, prompt: str) -> Any:
    """The replies of `SCRIPT`, of which those after results take their time."""
    text = next(reply for key, reply in reversed(SCRIPT.items()) if prompt.endswith(key))
    return apr.Reply(text, delay=0.005) if prompt.endswith(AFTER_RESULT) else text
