"""The fields of OpenAI's API in requests with `apr`, by the official client: streams, choices, stop, JSON, logprobs."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
import requests
from openai.types.responses import Response

import sgl_apr as apr
from sgl_apr.server.launch.launcher import Server
from tests.server.api.test_api_server import CHAT, FORKS, MESSAGES, TEXT, chat, client, get, post

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
RESPONSES, ANTHROPIC = "/v1/responses", "/v1/messages"
SCHEMA = {
    "type": "object",
    "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 999}, "sure": {"type": "boolean"}},
    "required": ["number", "sure"],
    "additionalProperties": False,
}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}


def joined(chunks: list, index: int = 0) -> dict[str, str]:
    """The texts of a choice of a streamed chat completion."""
    texts = {"content": "", "reasoning_content": ""}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index == index:
                texts["content"] += choice.delta.content or ""
                texts["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
    return texts


def texts_of(message: Any) -> dict[str, str]:
    return {"content": message.content, "reasoning_content": message.reasoning_content or ""}


# Streams


@pytest.mark.parametrize(
    "options", [{}, FORKS, {**FORKS, "max_blocks": 1}, {**FORKS, "separate_reasoning": False}, {"mode": "sequential"},
                {**FORKS, "dialect": "spawn"}],
    ids=["auto", "forks", "one fork", "one text", "sequential", "messages"],
)  # fmt: skip
def test_the_deltas_of_a_stream_are_the_message(server: Server, options: dict):
    whole = chat(server, options)
    *chunks, usage = chat(server, options, stream=True, stream_options={"include_usage": True})
    assert joined(chunks) == texts_of(whole.choices[0].message)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)
    assert usage.choices == []
    counts = ("prompt_tokens", "completion_tokens", "total_tokens", "completion_tokens_details")
    assert all(getattr(usage.usage, name) == getattr(whole.usage, name) for name in counts)
    assert usage.usage.completion_tokens_details.reasoning_tokens <= usage.usage.completion_tokens
    assert "apr" not in chunks[1].model_extra


def test_an_asynchronous_client_reads_the_same(server: Server):
    async def collect() -> list:
        async with client(server, openai.AsyncOpenAI) as asynchronous:
            stream = await asynchronous.chat.completions.create(
                model="m",
                messages=MESSAGES,
                temperature=0,
                max_tokens=200,
                stream=True,
                extra_body={"apr": FORKS},
            )
            return [chunk async for chunk in stream]

    assert joined(asyncio.run(collect())) == texts_of(chat(server, FORKS).choices[0].message)


def test_a_text_completion_streams_its_text(server: Server):
    for options in (FORKS, {**FORKS, "separate_reasoning": True}):
        request: dict = {"model": "m", "prompt": "Why?", "temperature": 0, "max_tokens": 150}
        completions = client(server).completions
        whole = completions.create(**request, extra_body={"apr": options})
        chunks = completions.create(**request, stream=True, extra_body={"apr": options})
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert ("<Parallel>" in whole.choices[0].text) == ("separate_reasoning" not in options)


# Choices


def test_choices_are_trajectories_of_their_own(server: Server):
    request: dict = {"n": 3, "temperature": 1.0, "seed": 7}
    before = get(server, "/apr/stats")["trajectories"]["finished"]
    whole = chat(server, FORKS, **request)
    assert get(server, "/apr/stats")["trajectories"]["finished"] == before + 3
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert [choice.apr["seed"] for choice in whole.choices] == [7, 8, 9]
    assert len({choice.message.reasoning_content for choice in whole.choices}) == 3
    totals = [choice.apr["metrics"]["total"] for choice in whole.choices]
    assert whole.usage.completion_tokens == sum(totals)
    assert whole.usage.prompt_tokens == chat(server, FORKS).usage.prompt_tokens
    chunks = list(chat(server, FORKS, **request, stream=True))
    done = {c.choices[0].index: c.apr for c in chunks if c.choices[0].finish_reason}
    assert [done[index]["seed"] for index in range(3)] == [7, 8, 9]
    for index in range(3):
        texts = joined(chunks, index)
        assert "<Parallel>" in texts["reasoning_content"]
        assert done[index]["blocks"]


def test_greedy_choices_are_equal(server: Server):
    whole = chat(server, FORKS, n=2)
    chunks = list(chat(server, FORKS, n=2, stream=True))
    messages = [texts_of(choice.message) for choice in whole.choices]
    assert messages[0] == messages[1] == joined(chunks, 0) == joined(chunks, 1)


# The answer


def test_a_stop_text_ends_the_answer(server: Server):
    whole = chat(server, {"mode": "sequential"}, max_tokens=60).choices[0].message.content
    stop = whole[20:23]
    position = whole.index(stop)
    for options in ({"mode": "sequential"}, {"mode": "auto"}):
        request: dict = {"max_tokens": 60, "stop": [stop, "never"]}
        answer = chat(server, options, **request)
        choice = answer.choices[0]
        if not answer.apr["blocks"]:
            assert choice.message.content == whole[:position]
            assert choice.finish_reason == "stop"
        assert joined(list(chat(server, options, **request, stream=True))) == texts_of(choice.message)
    early = chat(server, {"mode": "sequential"}, max_tokens=3000, stop=stop)
    assert early.usage.completion_tokens < 100, "decoding ended with the stop text"
    kept = chat(server, FORKS, stop="<Thread>")
    assert "<Thread>" in kept.choices[0].message.reasoning_content


@pytest.mark.parametrize("options", [{"mode": "sequential"}, {**FORKS, "max_blocks": 1}, FORKS])
def test_the_answer_is_json_that_fits_a_schema(server: Server, options: dict):
    answer = chat(server, options, max_tokens=400, temperature=1.0, response_format=JSON_FORMAT)
    (choice,) = answer.choices
    if choice.finish_reason == "length" and options is FORKS:  # the forks took the tokens
        return
    assert choice.finish_reason == "stop"
    found = json.loads(choice.message.content)
    assert found.keys() == {"number", "sure"}
    assert 0 <= found["number"] <= 999
    if "max_blocks" in options:
        assert "<Parallel>" in choice.message.reasoning_content
    chunks = chat(server, options, max_tokens=400, response_format=JSON_FORMAT, stream=True)
    json.loads(joined(list(chunks))["content"])


def test_an_answer_can_be_any_object(server: Server):
    request: dict = {"max_tokens": 200, "temperature": 0.7, "response_format": {"type": "json_object"}}
    choice = chat(server, {"mode": "sequential"}, **request).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert choice.message.content.lstrip().startswith("{")


def test_log_probabilities_are_those_of_the_content(server: Server):
    options = {**FORKS, "max_blocks": 1}
    request: dict = {"logprobs": True, "top_logprobs": 3, "temperature": 1.0}
    answer = chat(server, options, **request)
    (choice,) = answer.choices
    tokens = choice.logprobs.content
    text = b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace")
    assert choice.message.content.strip() in text
    for token in tokens:
        assert token.logprob <= 0
        assert 1 <= len(token.top_logprobs) <= 3
        assert max(one.logprob for one in token.top_logprobs) >= token.logprob - 1e-3
        assert bytes(token.bytes).decode(errors="replace") == token.token
    chunks = list(chat(server, options, **request, stream=True))
    (with_logprobs,) = [c for c in chunks if c.choices[0].logprobs]
    assert joined(chunks)["content"] == with_logprobs.choices[0].delta.content
    assert with_logprobs.choices[0].logprobs.content
    text = (
        client(server)
        .completions.create(
            model="m", prompt="Why?", max_tokens=60, logprobs=2, extra_body={"apr": {"mode": "sequential"}}
        )
        .choices[0]
    )
    found = text.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == len(found.top_logprobs)
    assert [c for c in "".join(found.tokens) if c.isascii()] == [c for c in text.text if c.isascii()]
    assert found.text_offset == sorted(found.text_offset)


def test_effort_is_a_budget(server: Server):
    assert chat(server, {"dialect": "threadweaver"}, reasoning_effort="none").apr["blocks"] == []
    low = chat(
        server, {"mode": "parallel", "dialect": "threadweaver"}, reasoning_effort="low", max_tokens=1000
    )
    assert len(low.apr["blocks"]) == 1
    assert len(low.apr["blocks"][0]["branches"]) == 2
    wide = chat(server, {**FORKS, "min_width": 3}, reasoning_effort="low")
    assert len(wide.apr["blocks"][0]["branches"]) == 3, "`apr` wins"


def test_what_clients_send_by_default_is_accepted(server: Server):
    answer = chat(
        server, FORKS, user="u", metadata={"a": "b"}, store=False, service_tier="auto", seed=3, logit_bias={},
        presence_penalty=0, frequency_penalty=0, parallel_tool_calls=True, n=1, top_p=1, modalities=["text"],
        response_format={"type": "text"}, safety_identifier="s", prompt_cache_key="k", stop=None,
    )  # fmt: skip
    assert answer.choices[0].message.content == chat(server, FORKS).choices[0].message.content


# What is refused

REFUSED: list[tuple[str, dict, str]] = [
    (CHAT, {"n": 17}, "--apr-max-choices 16"), (CHAT, {"n": 0}, "n"), (CHAT, {"stop": [""]}, "stop="),
    (CHAT, {"stop": ["x"] * 17}, "stop has 17 texts"), (CHAT, {"stop": "x" * 300}, "stop="),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"), (CHAT, {"logprobs": True, "top_logprobs": 21}, "0 to 20"),
    (CHAT, {"reasoning_effort": "ultra"}, "reasoning_effort"), (CHAT, {"store": True}, "store"),
    (CHAT, {"service_tier": "flex"}, "service_tier"), (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"min_tokens": 3}, "min_tokens"), (CHAT, {"ignore_eos": True}, "ignore_eos"), (CHAT, {"regex": "a"}, "regex"),
    (CHAT, {"skip_special_tokens": True}, "skip_special_tokens"), (CHAT, {"verbosity": "low"}, "verbosity"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"), (CHAT, {"temprature": 1}, "'temperature'"),
    (CHAT, {"prediction": {"type": "content", "content": "x"}}, "prediction"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
    (CHAT, {"apr": {"stream": "all"}, "stream": True, "stop": "x"}, "stop cannot be combined"),
    (CHAT, {"apr": {"stream": "trunk"}}, "expected \"content\" or \"all\""),
    (TEXT, {"best_of": 2}, "best_of"), (TEXT, {"echo": True}, "echo"), (TEXT, {"suffix": "x"}, "suffix"),
    (TEXT, {"logprobs": 21}, "0 to 20"),
    (RESPONSES, {"store": True}, "store"), (RESPONSES, {"background": True}, "background"),
    (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
    (RESPONSES, {"include": ["reasoning.encrypted_content"]}, "include"), (RESPONSES, {"truncation": "auto"}, "truncation"),
    (RESPONSES, {"apr": {"stream": "all"}}, "only for chat"), (RESPONSES, {"n": 2}, "'n'"),
    (ANTHROPIC, {"container": "c"}, "container"), (ANTHROPIC, {"n": 2}, "'n'"), (ANTHROPIC, {"apr": {"widht": 2}}, "widht"),
    (ANTHROPIC, {"thinking": {"type": "enabled", "budget_tokens": 2048}}, "budget_tokens"),
]  # fmt: skip
BASE: dict[str, dict] = {
    CHAT: {"model": "m", "messages": MESSAGES}, TEXT: {"model": "m", "prompt": "Q: "},
    RESPONSES: {"model": "m", "input": "Why?"}, ANTHROPIC: {"model": "m", "messages": MESSAGES, "max_tokens": 50},
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "fields", "message"), REFUSED, ids=[f"{r[0][4:8]} {str(r[1])[:40]}" for r in REFUSED]
)
def test_what_cannot_be_had_is_named(server: Server, path: str, fields: dict, message: str):
    answer = post(server, path, {**BASE[path], "apr": {}, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/generate", {"text": "Q"}), ("/v1/embeddings", {"model": "m", "input": "Q"}), ("/v1/rerank", {"query": "Q", "documents": ["a"]}),
     ("/api/chat", {"model": "m", "messages": MESSAGES}), ("/v1/messages/count_tokens", {"model": "m", "messages": MESSAGES})],
)  # fmt: skip
def test_routes_that_take_no_apr_say_so(server: Server, path: str, body: dict):
    answer = post(server, path, {**body, "apr": {}})
    assert answer.status_code == 400
    assert f"{path} takes no `apr`" in answer.json()["error"]["message"]
    assert CHAT in answer.json()["error"]["message"]
    assert "takes no `apr`" not in post(server, path, {**body, "apr": None}).text


# OpenAI's Responses API


def respond(server: Server, options: dict | None = None, **more: Any) -> Any:
    request = {"model": "m", "input": "Why do cats purr?", "temperature": 0, "max_output_tokens": 200, **more}
    return client(server).responses.create(
        **request, extra_body={"apr": FORKS if options is None else options}
    )


def test_a_response_has_reasoning_and_a_message(server: Server):
    answer = respond(server, instructions="Be brief.")
    same = chat(server, FORKS, messages=[{"role": "system", "content": "Be brief."}, *MESSAGES])
    reasoning, message = answer.output
    assert (reasoning.type, message.type, answer.object) == ("reasoning", "message", "response")
    assert texts_of(same.choices[0].message) == {
        "content": answer.output_text, "reasoning_content": reasoning.content[0].text,
    }  # fmt: skip
    assert answer.status == ("incomplete" if same.choices[0].finish_reason == "length" else "completed")
    assert answer.usage.output_tokens == same.usage.completion_tokens
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    assert answer.apr["blocks"] == same.apr["blocks"]
    Response.model_validate(answer.to_dict())


def test_a_streamed_response_adds_up(server: Server):
    whole = respond(server)
    events = list(respond(server, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    reasoning = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert reasoning == whole.output[0].content[0].text
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in events]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
    with client(server).responses.stream(
        model="m", input="Why do cats purr?", temperature=0, max_output_tokens=200, extra_body={"apr": FORKS}
    ) as stream:
        for _ in stream:
            pass
        if kinds[-1] == "response.completed":
            assert stream.get_final_response().output_text == whole.output_text


def test_a_response_is_json_and_has_logprobs(server: Server):
    text: Any = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}
    answer = respond(
        server, {"mode": "sequential"}, text=text, include=["message.output_text.logprobs"], top_logprobs=2
    )
    assert json.loads(answer.output_text).keys() == {"number", "sure"}
    assert answer.output[-1].content[0].logprobs
    assert respond(server, {}, reasoning={"effort": "none", "summary": "auto"}).output[0].type == "message"


# Anthropic's Messages API


def claude(server: Server) -> Any:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def converse(server: Server, options: dict | None = None, **more: Any) -> Any:
    request = {"model": "m", "messages": MESSAGES, "max_tokens": 200, **more}
    extra = {"temperature": 0, "apr": FORKS if options is None else options}
    return claude(server).messages.create(**request, extra_body=extra)


def test_a_message_has_thinking_and_a_text(server: Server):
    answer = converse(server)
    same = chat(server, FORKS)
    thinking, text = answer.content
    assert (thinking.type, text.type, answer.role) == ("thinking", "text", "assistant")
    assert texts_of(same.choices[0].message) == {"content": text.text, "reasoning_content": thinking.thinking}
    assert answer.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[same.choices[0].finish_reason]
    assert answer.usage.output_tokens == same.usage.completion_tokens
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == same.usage.prompt_tokens
    assert answer.apr["blocks"] == same.apr["blocks"]


def test_a_streamed_message_adds_up(server: Server):
    whole = converse(server)
    request: dict = {"model": "m", "messages": MESSAGES, "max_tokens": 200}
    with claude(server).messages.stream(**request, extra_body={"apr": FORKS, "temperature": 0}) as stream:
        pieces = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert pieces == whole.content[-1].text
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.content[0].thinking == whole.content[0].thinking
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_a_message_stops_and_can_go_without_thinking(server: Server):
    whole = converse(server, {"mode": "sequential"}, max_tokens=60).content[-1].text
    stop = whole[20:23]
    answer = converse(server, {"mode": "sequential"}, max_tokens=60, stop_sequences=[stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[-1].text == whole[: whole.index(stop)]
    assert [b.type for b in converse(server, {}, thinking={"type": "disabled"}).content] == ["text"]
    with pytest.raises(anthropic.BadRequestError, match="no dialect 'klingon'"):
        converse(server, {"dialect": "klingon"})


def server_sent(answer: requests.Response) -> Iterator[str]:
    return (line for line in answer.iter_lines(decode_unicode=True) if line)


def test_streams_are_as_their_apis_have_them(server: Server):
    for path, ending in (
        (RESPONSES, "event: response."),
        (ANTHROPIC, "event: message_stop"),
        (CHAT, "data: [DONE]"),
    ):
        body = {**BASE[path], "apr": {**FORKS, "budget": {"tokens": 200}}, "stream": True}
        body |= {"max_tokens": 200} if path == ANTHROPIC else {}
        with post(server, path, body, stream=True) as answer:
            lines = list(server_sent(answer))
        last = [line for line in lines if line.startswith("event:")] or lines
        assert last[-1].startswith(ending)


@pytest.mark.slow
def test_the_alias_stands_for_apr_on_all_routes(server: Server):
    alias = f"{get(server, '/v1/models')['data'][0]['id']}:apr"
    assert respond(server, model=alias).model == converse(server, model=alias).model == alias
    for path in (RESPONSES, ANTHROPIC):
        assert "apr" in post(server, path, {**BASE[path], "model": alias}).json()
        assert "apr" not in post(server, path, {**BASE[path], "apr": False}).json()


def test_the_trajectory_is_that_of_the_reply(server: Server):
    for answer in (
        respond(server, {**FORKS, "trajectory": True}),
        converse(server, {**FORKS, "trajectory": True}),
    ):
        trajectory = apr.Trajectory.from_json(json.dumps(answer.apr["trajectory"]))
        assert trajectory.blocks
