"""Trajectories over HTTP: the official openai client, curl, disconnects, limits, API keys, metrics."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import openai
import pytest
import requests

import sgl_apr as apr
from sgl_apr.runtime.event_json import event_from_json
from sgl_apr.server.launch.launcher import Server
from tests.support.paths import EXAMPLES
from tests.support.processes import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
MESSAGES: Any = [{"role": "user", "content": "Why do cats purr?"}]
FORKS = {"dialect": "threadweaver", "mode": "parallel", "budget": {"width": 3}}
TEXT_OF_ALL = {"separate_reasoning": False}  # the content is the complete text
KEY = "sesame"


def client(server: Server, kind: type = openai.OpenAI, key: str = "none") -> Any:
    return kind(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def chat(server: Server, options: dict | None = None, **more: Any) -> Any:
    """One chat completion by the official client; greedy, short."""
    more = {"model": "m", "messages": MESSAGES, "max_tokens": 200, "temperature": 0} | more
    extra = {} if options is None else {"extra_body": {"apr": options}}
    return client(server).chat.completions.create(**more, **extra)


def post(server: Server, path: str, body: Any, **more: Any) -> requests.Response:
    return requests.post(server.url + path, json=body, timeout=120, **more)


def get(server: Server, path: str, key: str = "none") -> dict:
    answer = requests.get(server.url + path, timeout=30, headers={"Authorization": f"Bearer {key}"})
    answer.raise_for_status()
    return answer.json()


# The official client


def check(text: str, found: dict) -> None:
    """The structure is what reading the text gives."""
    read = apr.dialect(found["dialect"]).parse(text)
    assert [(tuple(b["path"]), b["conclusion"]) for b in found["blocks"]] == [
        (b.path, b.conclusion) for b in read.blocks
    ]
    assert [(tuple(b["path"]), b["outline"], b["text"]) for x in found["blocks"] for b in x["branches"]] == [
        (b.path, b.outline, b.text) for x in read.blocks for b in x.branches
    ]
    assert found["blocks"]
    assert all(b["outcome"] and b["tokens"] for x in found["blocks"] for b in x["branches"])


def test_a_chat_completion(server: Server):
    answer = chat(server, FORKS)
    (choice,) = answer.choices
    check(choice.message.reasoning_content + choice.message.content, answer.apr)
    assert (answer.object, answer.model, choice.message.role) == ("chat.completion", "m", "assistant")
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.completion_tokens == usage.apr["total"] == answer.apr["metrics"]["total"] <= 200
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens <= usage.completion_tokens
    assert usage.apr["forks"] == len(answer.apr["blocks"])
    assert 0 < usage.apr["critical_path"] < usage.apr["total"]
    assert usage.apr["cached"] > 0


def test_a_text_completion(server: Server):
    answer = client(server).completions.create(
        model="m", prompt="Why?", temperature=0.8, max_tokens=150, extra_body={"apr": FORKS}
    )
    check(answer.choices[0].text, answer.apr)
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens <= 150


def test_the_prompt_is_that_of_the_chat_template(server: Server):
    plain, answer = chat(server, max_tokens=1), chat(server, {**FORKS, "trajectory": True})
    trajectory = apr.Trajectory.from_json(json.dumps(answer.apr["trajectory"]))
    message = answer.choices[0].message
    assert trajectory.text == message.reasoning_content + message.content
    assert "<|im_start|>user\nWhy do cats purr?" in trajectory.prompt
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens == trajectory.spans[0].tokens
    same = apr.run(
        server.url,
        trajectory.spans[0].token_ids,
        "threadweaver",
        mode="parallel",
        temperature=0,
        budget=apr.Budget(tokens=200, width=3),
    )
    assert same.text == trajectory.text


def test_the_messages_of_branches_go_through_the_chat_template(server: Server):
    options = {"dialect": "spawn", "mode": "parallel", "trajectory": True}
    answer = chat(server, options, max_tokens=400)
    trajectory = apr.Trajectory.from_json(json.dumps(answer.apr["trajectory"]))
    heads = [s.text for s in trajectory.spans if s.role == "header"]
    assert heads
    assert all(head.startswith("<|im_start|>user\n") for head in heads)
    assert all(head.endswith("<|im_start|>assistant\n") for head in heads)


def test_the_answer_separate_from_the_trace(server: Server):
    whole, separate = (
        chat(server, FORKS | TEXT_OF_ALL),
        chat(server, FORKS).choices[0].message,
    )
    assert separate.reasoning_content + separate.content == whole.choices[0].message.content
    assert separate.reasoning_content.rstrip().endswith("</Parallel>")
    assert "<Parallel>" not in separate.content


def regrouped(trajectory: apr.Trajectory) -> dict[tuple[int, ...], str]:
    written: dict = defaultdict(str)
    for span in trajectory.reply:
        written[span.path] += span.text
    return dict(written)


def test_a_stream_is_tagged_by_branch(server: Server):
    async def collect() -> list:
        async with client(server, openai.AsyncOpenAI) as asynchronous:
            stream = await asynchronous.chat.completions.create(
                model="m",
                messages=MESSAGES,
                temperature=0,
                max_completion_tokens=200,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"apr": {**FORKS, "trajectory": True, "stream": "all"}},
            )
            return [chunk async for chunk in stream]

    *chunks, last, usage = asyncio.run(collect())
    received: dict = defaultdict(str)
    for chunk in chunks:
        received[tuple(chunk.apr["path"])] += chunk.choices[0].delta.content
    trajectory = apr.Trajectory.from_json(json.dumps(last.apr["trajectory"]))
    assert {path: text for path, text in received.items() if text} == regrouped(trajectory)
    events = [c.apr["event"] for c in chunks if "event" in c.apr]
    branches = [b for x in trajectory.blocks for b in x.branches]
    assert events.count("forked") == events.count("joined") == len(trajectory.blocks) > 0
    assert events.count("branch_ended") == len(branches)
    assert last.choices[0].finish_reason in ("stop", "length")
    assert usage.choices == []
    assert usage.usage.completion_tokens == trajectory.metrics().total
    assert trajectory.text == chat(server, FORKS | TEXT_OF_ALL).choices[0].message.content


def test_without_apr_it_is_sglangs_answer(server: Server):
    prompt = (
        apr.Trajectory.from_json(
            json.dumps(
                chat(server, {"mode": "sequential", "trajectory": True}, max_tokens=2).apr["trajectory"]
            )
        )
        .spans[0]
        .token_ids
    )
    sampling = {"temperature": 0, "max_new_tokens": 24, "skip_special_tokens": False}
    raw = post(server, "/generate", {"input_ids": prompt, "sampling_params": sampling}).json()
    options = {"max_tokens": 24, "extra_body": {"skip_special_tokens": False}}
    for extra in ({}, {"apr": None}):
        options["extra_body"] = {"skip_special_tokens": False, **extra}
        answer = chat(server, **options)
        assert answer.choices[0].message.content == raw["text"]
        assert "apr" not in answer.model_extra
    chunks = list(chat(server, stream=True, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == raw["text"]


# curl


def test_curl(server: Server):
    body = json.dumps({"model": "m", "messages": MESSAGES, "max_tokens": 200, "apr": FORKS})
    command = [
        "curl",
        "-sS",
        "-N",
        f"{server.url}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
    ]

    def run(body: str) -> str:
        return subprocess.run(
            [*command, body], capture_output=True, text=True, check=True, timeout=120
        ).stdout

    answer = json.loads(run(body))
    message = answer["choices"][0]["message"]
    check(message["reasoning_content"] + message["content"], answer["apr"])
    *lines, done = run(json.dumps({**json.loads(body), "stream": True})).strip().split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(lines[-1].removeprefix("data: "))["apr"]["blocks"]


# The native form

NATIVE = {"prompt": "Q: ", **FORKS, "budget": {"tokens": 200, "width": 3}, "temperature": 0}


def test_generate_gives_the_trajectory(server: Server):
    answer = post(server, "/apr/generate", NATIVE)
    trajectory = apr.Trajectory.from_json(answer.text)
    apr.dialect("threadweaver").validate(trajectory.text)
    assert trajectory.prompt == "Q: "
    by_ids = post(
        server, "/apr/generate", {**NATIVE, "prompt": None, "input_ids": trajectory.spans[0].token_ids}
    )
    assert apr.Trajectory.from_json(by_ids.text).text == trajectory.text


def test_a_stream_of_events_is_the_trajectory(server: Server):
    def objects() -> Iterator[dict]:
        with post(server, "/apr/generate", {**NATIVE, "seed": 1, "stream": True}, stream=True) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines.pop() == b"data: [DONE]"
        yield from (json.loads(line.removeprefix(b"data: ")) for line in lines)

    events = [event_from_json(data) for data in objects()]
    rebuilt = apr.rebuild(events)
    whole = apr.Trajectory.from_json(post(server, "/apr/generate", {**NATIVE, "seed": 1}).text)
    assert (rebuilt.limits, rebuilt.seed) == (whole.limits, 1)
    # The calls of branches are numbered as they end.
    assert [replace(s, call=None) for s in rebuilt.spans] == [replace(s, call=None) for s in whole.spans]
    received: dict = defaultdict(str)
    for event in events:
        if isinstance(event, apr.Delta):
            received[event.path] += event.text
    assert received == regrouped(rebuilt)


def test_the_dialects(server: Server):
    found = get(server, "/apr/dialects")
    assert [d["name"] for d in found["dialects"]] == apr.dialect_names()
    assert found["default"] == "threadweaver"
    one = next(d for d in found["dialects"] if d["name"] == "multiverse")
    known = apr.dialect("multiverse")
    assert (one["max_depth"], one["joins"], one["tags"]) == (
        known.max_depth,
        list(known.joins),
        list(known.tags),
    )


def test_stats_count(server: Server):
    before = get(server, "/apr/stats")
    answer = chat(server, FORKS)
    after = get(server, "/apr/stats")
    assert after["trajectories"]["finished"] == before["trajectories"]["finished"] + 1
    assert after["tokens"] - before["tokens"] == answer.usage.completion_tokens
    assert after["forks"] - before["forks"] == answer.usage.apr["forks"]
    assert (after["running"], after["grammar_backend"]) == (0, "llguidance")


# What is wrong

CHAT, TEXT, OWN = "/v1/chat/completions", "/v1/completions", "/apr/generate"
BASE = {
    CHAT: {"model": "m", "messages": MESSAGES},
    TEXT: {"model": "m", "prompt": "Q: "},
    OWN: {"prompt": "Q: "},
}
WRONG = [
    (CHAT, {"apr": {"dialect": "klingon"}}, "grammar_error", "no dialect 'klingon'"),
    (CHAT, {"apr": {"budget": {"tokens": 0}}}, "budget_exceeded", "at least 1"),
    (CHAT, {"apr": {"mode": "parallel", "budget": {"tokens": 5}}}, "budget_exceeded", "tokens"),
    (CHAT, {"apr": {"join": "message"}}, "apr_error", "joins by"),
    (CHAT, {"apr": {"join": "kv", "dialect": "spawn"}}, "kv_join_unavailable", "spawn joins by"),
    (CHAT, {"apr": {"widht": 2}}, "apr_error", "no option 'widht'"),
    (CHAT, {"apr": {"tool": ["f"]}}, "apr_error", "no option 'tool', did you mean 'tools'"),
    (CHAT, {"apr": {"branch_prompt_template": "str"}}, "apr_error", "no option 'branch_prompt_template'"),
    (CHAT, {"apr": "yes"}, "apr_error", "expected an object"),
    (CHAT, {"apr": {"stream": "branches"}}, "apr_error", "all"),
    (CHAT, {"apr": {}, "messages": []}, "apr_error", "[Mm]essages"),
    (CHAT, {"apr": {"lora_path": "nobody"}}, "engine_error", "[Ll]o[Rr][Aa]"),
    (CHAT, {"apr": {}, "top_p": 7, "stream": True}, "apr_error", "top_p=7"),
    (TEXT, {"apr": {}, "echo": True}, "apr_error", "echo"),
    (TEXT, {"apr": {}, "prompt": ["a", "b"]}, "apr_error", "one prompt"),
    (OWN, {"temperature": -1}, "apr_error", "temperature=-1"),
    (OWN, {"temperature": -1, "stream": True}, "apr_error", "temperature=-1"),
    (OWN, {"lora_path": "nobody", "stream": True}, "engine_error", "[Ll]o[Rr][Aa]"),
    (OWN, {"prompt": 5}, "apr_error", "expected one prompt"),
    (OWN, {"prompt": ""}, "apr_error", "expected one prompt"),
    (OWN, {"input_ids": [1]}, "apr_error", "not both"),
    (OWN, {"prompt": None, "input_ids": [1, "x"]}, "apr_error", "token ids"),
    (OWN, {"prompt": None, "input_ids": [10**9]}, "apr_error", "vocab"),
    (OWN, {"policy": "__import__('os')"}, "apr_error", "policy="),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "code", "message"), WRONG, ids=[str(w[1])[:60] for w in WRONG])
def test_a_bad_request_gets_an_error_message(server: Server, path: str, body: dict, code: str, message: str):
    answer = post(server, path, {**BASE[path], **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert re.search(message, error["message"]), error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b'{"prompt": "\\ud800"}', b'{"seed": NaN}'])
def test_a_body_that_is_no_object(server: Server, body: bytes):
    headers = {"Content-Type": "application/json"}
    answer = requests.post(server.url + OWN, body, headers=headers, timeout=30)
    assert answer.status_code == 400
    assert "the body" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT, "/generate"])
def test_a_body_of_a_wrong_type_is_a_bad_request(server: Server, path: str):
    bodies = [
        "null",
        "[]",
        '"x"',
        "5",
        "{",
        "[" * 900 + "]" * 900,
        '{"model": [], "prompt": {}, "messages": 5, "text": 5}',
    ]
    bodies += [
        json.dumps({**BASE.get(path, {"text": "Q"}), "response_format": value}) for value in (True, 1, [1])
    ]
    headers = {"Content-Type": "application/json"}
    for body in bodies[:-3] if path != CHAT else bodies:
        answer = requests.post(server.url + path, body, headers=headers, timeout=30)
        assert answer.status_code == 400, (body[:60], answer.text)


def test_a_long_prompt_is_refused_at_once(server: Server):
    headers = {"Content-Type": "application/json"}
    keys = "{" + ", ".join(f'"key{n}": 1' for n in range(300_000)) + "}"
    bodies = [json.dumps({"prompt": "word " * 1_500_000}), json.dumps({"input_ids": [1] * 2_000_000}), keys]
    for body in bodies:
        start = time.monotonic()
        answer = requests.post(server.url + OWN, body, headers=headers, timeout=60)
        assert answer.status_code in (400, 413), answer.text
        assert len(answer.text) < 700
        assert time.monotonic() - start < 5.0


BAD_VALUES = [
    '"logit_bias": {"5": "x"}', '"logit_bias": {"5": null}', '"logit_bias": {"5": [1]}', '"logit_bias": {"5": 3e38}',
    '"logit_bias": {"99999999": 1}', '"logit_bias": {"a": 1}', '"top_k": 99999999999999', '"top_k": 2147483648',
    '"top_k": 0', '"temperature": 1e300', '"temperature": -1', '"top_p": 0', '"top_p": 1e-300', '"min_p": 2',
    '"frequency_penalty": 3', '"presence_penalty": -3', '"repetition_penalty": 1e-40', '"repetition_penalty": 0',
    '"seed": 9223372036854775808', '"seed": 18446744073709551617', f'"seed": {"9" * 400}',
    '"priority": 9223372036854775808', f'"temperature": {"9" * 400}', f'"logit_bias": {{"5": {"9" * 400}}}',
]  # fmt: skip


def test_bad_values_leave_the_server_alive(server: Server):
    """SGLang's scheduler, and the server with it, would end with some of these values."""
    limits = '"budget": {"tokens": 20}'

    def send(path: str, values: str) -> requests.Response:
        base = json.dumps(BASE[path])[1:-1]
        body = f"{{{base}, {values}}}".encode()
        headers = {"Content-Type": "application/json"}
        return requests.post(server.url + path, body, headers=headers, timeout=120)

    for value in BAD_VALUES:
        requests_ = [(OWN, f"{limits}, {value}"), (CHAT, f'"apr": {{{limits}, {value}}}')]
        requests_ += [] if "priority" in value else [(CHAT, f'{value}, "apr": {{{limits}}}')]
        if "seed" not in value and "priority" not in value:
            requests_ += [(OWN, f'{limits}, "sampling": {{{value}}}')]
        for path, values in requests_:
            answer = send(path, values)
            assert answer.status_code == 400, (path, values, answer.text)
    good = '"top_k": 2147483647, "temperature": 1e-5, "logit_bias": {"5": 1e20, "6": -1e20}, "min_p": 1'
    extreme = '"top_k": -1, "temperature": 1e38, "repetition_penalty": 1e-6, "top_p": 2e-38'
    for value in (good, extreme, '"temperature": 1'):
        answer = send(OWN, f"{limits}, {value}")
        assert answer.status_code == 200, (value, answer.text)
        assert answer.json()["spans"], value


def test_the_client_raises_what_is_wrong(server: Server):
    with pytest.raises(openai.BadRequestError, match="no dialect 'klingon'"):
        chat(server, {"dialect": "klingon"})


# Clients that leave


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", [CHAT, OWN])
def test_a_client_that_leaves_ends_its_trajectory(server: Server, path: str, streamed: bool):
    cancelled = get(server, "/apr/stats")["trajectories"]["cancelled"]
    options = {"dialect": "threadweaver", "mode": "parallel", "min_blocks": 200, "budget": {"tokens": 7000}}
    body = json.dumps(
        {**BASE[path], "stream": streamed, **(options if path == OWN else {"apr": options})}
    ).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        until(lambda: get(server, "/apr/stats")["running"] == 1)
        if streamed:
            assert b"200 OK" in connection.recv(4096)
    until(lambda: get(server, "/apr/stats")["running"] == 0)
    assert get(server, "/apr/stats")["trajectories"]["cancelled"] == cancelled + 1
    until(lambda: idle(get(server, "/v1/loads")["loads"]))


def idle(loads: list[dict]) -> bool:
    return all(x["num_running_reqs"] == x["num_waiting_reqs"] == x["num_used_tokens"] == 0 for x in loads)


def test_many_at_once(server: Server):
    async def go() -> list:
        async with client(server, openai.AsyncOpenAI) as asynchronous, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    asynchronous.chat.completions.create(
                        model="m",
                        messages=MESSAGES,
                        max_tokens=120,
                        temperature=0.7,
                        extra_body={"apr": FORKS},
                    )
                )
                for _ in range(8)
            ]
        return [task.result() for task in tasks]

    for answer in asyncio.run(go()):
        message = answer.choices[0].message
        check(message.reasoning_content + message.content, answer.apr)


# The operator's side


@pytest.fixture(scope="module")
def guarded(
    forked_server: type[Server], server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The same model with an API key, limits and metrics."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    flags = {
        "radix_cache_backend": "stock",
        "api_key": KEY,
        "enable_metrics": True,
        "max_total_tokens": 8192,
        "context_length": 2048,
    }
    limits = {
        "apr_max_width": 3,
        "apr_max_tokens": 1500,
        "apr_max_depth": 1,
        "apr_max_seconds": 60,
        "apr_max_concurrent": 2,
        "apr_max_queued": 1,
        "apr_queue_timeout": 2,
        "apr_default": '{"dialect": "threadweaver", "budget": {"tokens": 700}, "separate_reasoning": true}',
    }
    with forked_server(get(server, "/model_info")["model_path"], log_path=log, **flags, **limits) as guarded:
        yield guarded


def keyed(guarded: Server, body: dict, path: str = OWN, **more: Any) -> requests.Response:
    return post(guarded, path, {**BASE[path], **body}, headers={"Authorization": f"Bearer {KEY}"}, **more)


def test_the_api_key_protects_every_route(guarded: Server):
    for key in (None, "wrong"):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for path in (CHAT, TEXT, OWN):
            assert post(guarded, path, {**BASE[path], "apr": {}}, headers=headers).status_code == 401
        for path in ("/apr/stats", "/apr/dialects"):
            assert requests.get(guarded.url + path, headers=headers, timeout=30).status_code == 401
    answer = client(guarded, key=KEY).chat.completions.create(
        model="m", messages=MESSAGES, extra_body={"apr": {**FORKS, "separate_reasoning": False}}
    )
    check(answer.choices[0].message.content, answer.apr)


@pytest.mark.parametrize(
    ("budget", "flag"),
    [
        ({"width": 4}, "--apr-max-width 3"),
        ({"tokens": 1501}, "--apr-max-tokens 1500"),
        ({"depth": 2}, "--apr-max-depth 1"),
        ({"seconds": 61}, "--apr-max-seconds 60"),
    ],
)
def test_a_request_above_a_limit_is_refused(guarded: Server, budget: dict, flag: str):
    for path, body in ((OWN, {"budget": budget}), (CHAT, {"apr": {"budget": budget}})):
        answer = keyed(guarded, {**body, "dialect": "multiverse"} if path == OWN else body, path)
        assert answer.status_code == 400
        assert flag in answer.json()["error"]["message"]


def test_a_request_without_a_width_gets_the_limit(guarded: Server):
    answer = keyed(
        guarded, {"mode": "parallel", "dialect": "threadweaver", "min_blocks": 8, "temperature": 1.0}
    )
    trajectory = apr.Trajectory.from_json(answer.text)
    assert len(trajectory.blocks) >= 8
    assert max(len(block.branches) for block in trajectory.blocks) == 3
    assert trajectory.metrics().total <= 1500


LONG = {
    "mode": "parallel",
    "dialect": "threadweaver",
    "min_blocks": 60,
    "budget": {"tokens": 1500},
    "stream": True,
}


def stats_of(guarded: Server) -> dict:
    return get(guarded, "/apr/stats", KEY)


def test_more_than_may_run_at_once_wait_and_are_refused_then(guarded: Server):
    refused_before = stats_of(guarded)["trajectories"]["refused"]
    short = {"budget": {"tokens": 20}}
    long = [keyed(guarded, LONG, stream=True) for _ in range(2)]
    with long[0], long[1], ThreadPoolExecutor() as pool:
        waiting = pool.submit(keyed, guarded, short)
        until(lambda: stats_of(guarded)["queued"] == 1)
        assert prometheus(guarded, "queued") == 1
        assert prometheus(guarded, "running") == 2
        for path, body in ((OWN, {}), (OWN, {"stream": True}), (CHAT, {"apr": {}})):
            refused = keyed(guarded, body, path)
            assert refused.status_code == 503
            assert 1 <= int(refused.headers["Retry-After"]) <= 600
            assert refused.json()["error"]["code"] == "server_busy"
            assert "--apr-max-concurrent 2" in refused.json()["error"]["message"]
            assert "--apr-max-queued 1" in refused.json()["error"]["message"]
        late = waiting.result()
        assert late.status_code == 503
        assert "--apr-queue-timeout 2" in late.json()["error"]["message"]
        assert stats_of(guarded)["trajectories"]["refused"] == refused_before + 4
        waiting = pool.submit(keyed, guarded, {**short, "stream": True})
        until(lambda: stats_of(guarded)["queued"] == 1)
        long[1].close()
        served = waiting.result()
        assert served.status_code == 200
        assert served.text.endswith("data: [DONE]\n\n")
    until(lambda: stats_of(guarded)["running"] == 0)
    assert prometheus(guarded, "running") == prometheus(guarded, "queued") == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_disconnects_leaves_the_queue(guarded: Server, streamed: bool):
    cancelled = stats_of(guarded)["trajectories"]["cancelled"]
    with keyed(guarded, LONG, stream=True), keyed(guarded, LONG, stream=True):
        body = json.dumps({**BASE[OWN], "stream": streamed}).encode()
        host, port = guarded.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST {OWN} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: stats_of(guarded)["queued"] == 1)
        until(lambda: stats_of(guarded)["queued"] == 0)
        until(lambda: stats_of(guarded)["trajectories"]["cancelled"] == cancelled + 1)
    until(lambda: stats_of(guarded)["running"] == 0)


# Defaults of the operator, and clients that cannot send `apr`


def test_default_options_are_those_of_requests_that_do_not_set_them(guarded: Server):
    trajectory = apr.Trajectory.from_json(keyed(guarded, {"mode": "parallel", "min_blocks": 40}).text)
    assert 350 < trajectory.metrics().total <= 700
    own = {"mode": "parallel", "min_blocks": 40, "budget": {"tokens": 300}}
    assert apr.Trajectory.from_json(keyed(guarded, own).text).metrics().total <= 300
    assert stats_of(guarded)["default_options"]["budget"] == {"tokens": 700}
    answer = keyed(guarded, {"max_tokens": 300, "apr": {"mode": "parallel"}}, CHAT).json()
    assert answer["usage"]["completion_tokens"] <= 300, answer
    assert "<Parallel>" in answer["choices"][0]["message"]["reasoning_content"], "separate_reasoning"


def test_a_model_name_stands_for_apr(server: Server):
    name = get(server, "/v1/models")["data"][0]["id"]
    alias = f"{name}:apr"
    models = client(server).models.list().data
    assert [m.id for m in models] == [name, alias]
    card = client(server).models.retrieve(alias)
    assert (card.id, card.root, card.max_model_len) == (alias, name, models[0].max_model_len)
    assert client(server).models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError):
        client(server).models.retrieve("nobody:apr")
    plain = chat(server, {}, model=name)
    answer = chat(server, model=alias)
    assert answer.model == alias
    assert answer.choices[0].message.content == plain.choices[0].message.content
    assert answer.apr["dialect"] == plain.apr["dialect"]
    text = client(server).completions.create(model=alias, prompt="Q: ", max_tokens=50)
    assert text.apr["metrics"]["total"] <= 50
    with pytest.raises(openai.BadRequestError, match="min_tokens cannot be combined with apr"):
        chat(server, model=alias, extra_body={"min_tokens": 2})
    stock = post(server, CHAT, {**BASE[CHAT], "model": alias, "max_tokens": 5, "apr": False}).json()
    assert "apr" not in stock
    chunks = list(chat(server, model=alias, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content


def test_a_join_in_the_cache(server: Server, guarded: Server):
    options = {"join": "kv", "dialect": "multiverse", "mode": "parallel", "budget": {"tokens": 400}}
    before = get(server, "/apr/stats")
    trajectory = apr.Trajectory.from_json(post(server, OWN, {**BASE[OWN], **options}).text)
    after = get(server, "/apr/stats")
    assert before["joins_kv"]
    assert {join.by for join in trajectory.joins} == {"kv"}
    assert after["joins"]["kv"] - before["joins"]["kv"] == len(trajectory.joins) > 0
    assert after["text_fallbacks"] == before["text_fallbacks"]
    answer = keyed(guarded, options)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "kv_join_unavailable")


def prometheus(guarded: Server, name: str, label: str = "") -> float:
    text = requests.get(f"{guarded.url}/metrics", timeout=30).text
    lines = [x for x in text.splitlines() if x.startswith(f"sgl_apr:{name}{{") and label in x]
    assert len(lines) == 1, lines
    return float(lines[0].rsplit(" ", 1)[1])


def test_prometheus_has_the_same_counts(guarded: Server):
    assert keyed(guarded, {"mode": "parallel", "dialect": "threadweaver", "budget": {"tokens": 200}}).ok
    stats = stats_of(guarded)
    assert "sglang:" in requests.get(f"{guarded.url}/metrics", timeout=30).text

    def value(name: str, label: str = "") -> float:
        return prometheus(guarded, f"{name}_total", label)

    for outcome, count in stats["trajectories"].items():
        assert value("trajectories", f'outcome="{outcome}"') == count
    for by, count in stats["joins"].items():
        assert value("joins", f'by="{by}"') == count
    for name in (
        "tokens",
        "critical_path_tokens",
        "cached_tokens",
        "reprefilled_tokens",
        "forks",
        "text_fallbacks",
    ):
        assert value(name) == stats[name]
    assert stats["trajectories"]["finished"] > 0
    assert stats["trajectories"]["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "sglang-oai-chat", "trajectories"])
def test_sglangs_own_benchmark_runs_to_the_end(server: Server, backend: str, tmp_path):
    report = tmp_path / "report.jsonl"
    command = (
        f"-m sglang.bench_serving --base-url {server.url} --model {get(server, '/model_info')['model_path']} "
        f"--dataset-name random-ids --num-prompts 12 --random-input-len 24 --random-output-len 120 "
        f"--random-range-ratio 1 --max-concurrency 4 --output-file {report}"
    ).split()
    if backend == "trajectories":
        body = json.dumps({"apr": {"dialect": "threadweaver", "mode": "parallel"}})
        command += ["--backend", "sglang-oai-chat", "--disable-ignore-eos", "--extra-request-body", body]
        command += ["--warmup-requests", "0"]  # that would be one of 32 tokens, which bear no fork
    else:
        command += ["--backend", backend]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(report.read_text().splitlines()[-1])["completed"] == 12


def test_the_example_runs(server: Server):
    script = EXAMPLES / "openai_client.py"
    done = subprocess.run(
        [sys.executable, str(script), "--url", server.url], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "fork into" in done.stdout
    assert "forked [1]" in done.stdout
    assert re.search(r"""1\.1 ['"]<Thread>""", done.stdout), "quoted as what was sampled wants it"
