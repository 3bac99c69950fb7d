"""Responses of OpenAI's Responses API and Anthropic's Messages API, read by the official clients, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
from fastapi import FastAPI, Request

import sgl_apr as apr
from sgl_apr.runtime.event_queue import stream_events
from sgl_apr.runtime.options import make_options
from sgl_apr.server.api.compatible.messages_request import _thinking_options, parse_messages_request
from sgl_apr.server.api.compatible.messages_response import MESSAGE_EVENTS, MessageBuilder, message_error
from sgl_apr.server.api.compatible.responses_request import parse_responses_request
from sgl_apr.server.api.compatible.responses_response import RESPONSE_EVENTS, ResponseBuilder
from sgl_apr.server.api.config import ApiConfig
from sgl_apr.server.api.http_errors import json_response, respond_to_errors, respond_with
from sgl_apr.server.api.http_streams import event_stream
from sgl_apr.server.api.openai.reply_stream import ReplyStream, reply_deltas
from sgl_apr.server.api.openai.response_options import ResponseOptions
from tests.runtime.test_loop import scripted

MESSAGES: Any = [{"role": "user", "content": "Why?"}]
STOP = ("on",)  # of "Done."


def reply_to(builder: Any, events_format: Any, complete: Callable, body: dict, receive: Any) -> Any:
    """A response to a request, over the scripted engine."""

    def start(on_event):
        return apr.areason(scripted(), "Q: ", "threadweaver", on_event=on_event, max_blocks=1)

    async def respond() -> Any:
        if body.get("stream"):
            reply = ReplyStream(
                make_options("threadweaver", max_blocks=1), separate_reasoning=True, stop=builder.options.stop
            )
            return await event_stream(
                receive, builder.events(reply_deltas(stream_events(start), reply)), events_format
            )
        return json_response(complete(await start(None)))

    return respond()


@pytest.fixture(scope="module")
def app() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/messages")
    @respond_with(message_error)
    async def messages(request: Request):
        body = await request.json()
        if body.get("model") == "wrong":
            raise apr.AprError("no option 'widht'")
        options = ResponseOptions(stop=tuple(body.get("stop_sequences", ())))
        builder = MessageBuilder("m", options, body.get("model") != "hidden")
        return await reply_to(builder, MESSAGE_EVENTS, builder.message, body, request.receive)

    @app.post("/v1/responses")
    @respond_to_errors
    async def responses(request: Request):
        body = await request.json()
        builder = ResponseBuilder("m", body, ResponseOptions(), shows_summary="reasoning" in body)
        return await reply_to(builder, RESPONSE_EVENTS, builder.response, body, request.receive)

    return app


def clients(app: FastAPI) -> tuple[anthropic.AsyncAnthropic, openai.AsyncOpenAI]:
    common: dict = {"api_key": "x", "max_retries": 0}
    http: Any = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
    claude = anthropic.AsyncAnthropic(base_url="http://t", http_client=http, **common)
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    return claude, openai.AsyncOpenAI(base_url="http://t/v1", http_client=http, **common)


def expected() -> tuple[str, str]:
    trajectory = asyncio.run(apr.areason(scripted(), "Q: ", "threadweaver", max_blocks=1))
    return trajectory.text[: -len(trajectory.answer)], trajectory.answer


def test_a_message_of_anthropic_adds_up(app: FastAPI):
    async def ask() -> tuple[Any, Any, str]:
        claude, _ = clients(app)
        request: dict = {"model": "m", "messages": MESSAGES, "max_tokens": 50}
        whole = await claude.messages.create(**request)
        async with claude.messages.stream(**request) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            return whole, await stream.get_final_message(), text

    whole, streamed, text = asyncio.run(ask())
    for message in (whole, streamed):
        thinking, answer = message.content
        assert (thinking.thinking, answer.text) == expected()
        assert (message.stop_reason, message.stop_sequence, message.role) == ("end_turn", None, "assistant")
    assert text == expected()[1]
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    assert 0 < whole.usage.output_tokens_details.thinking_tokens < whole.usage.output_tokens
    assert whole.apr["blocks"]


def test_a_message_stops_hides_its_thinking_and_fails(app: FastAPI):
    async def ask(**more: Any) -> Any:
        return await clients(app)[0].messages.create(
            **{"model": "hidden", "messages": MESSAGES, "max_tokens": 50, **more}
        )

    message = asyncio.run(ask(stop_sequences=list(STOP)))
    assert [block.text for block in message.content] == ["D"]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "on")
    with pytest.raises(anthropic.BadRequestError, match="no option 'widht'"):
        asyncio.run(ask(model="wrong"))


def test_a_response_adds_up(app: FastAPI):
    async def ask() -> tuple[Any, list, Any]:
        _, client = clients(app)
        whole = await client.responses.create(model="m", input="Why?", reasoning={"summary": "auto"})
        stream = await client.responses.create(model="m", input="Why?", stream=True)
        events = [event async for event in stream]
        async with client.responses.stream(model="m", input="Why?") as helper:
            async for _ in helper:
                pass
            return whole, events, await helper.get_final_response()

    whole, events, final = asyncio.run(ask())
    reasoning, message = whole.output
    assert (reasoning.content[0].text, message.content[0].text) == expected()
    assert reasoning.summary[0].text == expected()[0]
    assert whole.status == "completed"
    assert final.output_text == whole.output_text == expected()[1]
    deltas = {"response.reasoning_text.delta": "", "response.output_text.delta": ""}
    for event in events:
        if event.type in deltas:
            deltas[event.type] += event.delta
    assert tuple(deltas.values()) == expected()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert whole.usage.output_tokens_details.reasoning_tokens > 0


def test_what_other_apis_do_not_have_is_refused():
    def refused(parse: Callable, body: dict, message: str) -> None:
        with pytest.raises(apr.AprError, match=message):
            asyncio.run(parse(None, None, None, body, {}, ApiConfig()))

    refused(parse_messages_request, {"n": 2}, "'n' is no field")
    for field in ({"tools": [{"name": "f"}]}, {"tool_choice": {"type": "any"}}):
        refused(parse_messages_request, field, "this route runs tools of the server only")
    for field in ({"tools": [{"name": "f"}]}, {"tool_choice": "required"}):
        refused(parse_responses_request, field, "this route runs tools of the server only")
    refused(parse_messages_request, {"container": "c"}, "container cannot be combined with apr")
    refused(parse_responses_request, {"previous_response_id": "r"}, "previous_response_id cannot be combined")
    refused(
        parse_responses_request, {"store": True}, "store=True cannot be combined with apr, expected False"
    )


def test_a_budget_for_thinking_leaves_the_rest_to_the_answer():
    def options(budget: int | None, max_tokens: int = 4000) -> dict:
        thinking = SimpleNamespace(budget_tokens=budget)
        return _thinking_options(SimpleNamespace(thinking=thinking, max_tokens=max_tokens))

    assert options(3000) == {"budget": {"reserve": 0.25}}
    assert options(None) == {}
    with pytest.raises(apr.AprError, match="budget_tokens=4000, expected less than max_tokens=4000"):
        options(4000)
    assert json.dumps(options(1024))
