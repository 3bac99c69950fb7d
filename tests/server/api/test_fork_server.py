"""Forks of a context on a real server: over Python and over HTTP, streamed, cancelled, and with a long context."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
import requests

import sgl_apr as apr
from sgl_apr.runtime.event_json import event_from_json
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import random_llama
from tests.server.api.test_schemas import validator
from tests.support.processes import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
DOCUMENT = "The model thinks about the problem. " * 40
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": DOCUMENT}]
TASKS = [
    "Find the sum.",
    "Find the numbers.",
    {"prompt": "Find the answer.", "name": "answer", "max_tokens": 5},
]
PATH = "/apr/fork"


def post(server: Server, **body: Any) -> requests.Response:
    return requests.post(server.url + PATH, json={"temperature": 0, **body}, timeout=120)


def check_sharing(results: Any, shared: int) -> None:
    for result in results:
        assert result["usage"]["cached_tokens"] >= shared - 1, result


def stats(server: Server) -> dict[str, Any]:
    return requests.get(f"{server.url}/apr/stats", timeout=30).json()


def test_a_fork_over_http_shares_its_context_and_merges(server: Server):
    body = {"messages": CHAT, "tasks": TASKS, "merge": "Write it down.", "budget": {"tokens": 120}}
    before = stats(server)
    response = post(server, **body)
    assert response.status_code == 200, response.text
    result = response.json()
    openapi = requests.get(f"{server.url}/openapi.json", timeout=30).json()
    validator(openapi, "AprForkRequest").validate(body)
    validator(openapi, "AprForkResult").validate(result)
    assert [r["name"] for r in result["results"]] == ["1", "2", "answer"]
    assert result["results"][2]["usage"]["output_tokens"] <= 5
    check_sharing(result["results"], result["shared_tokens"])
    assert result["shared_tokens"] > len(DOCUMENT) / 8
    assert result["merge"]["text"] == result["answer"] != ""
    trajectory = apr.Trajectory.from_json(json.dumps(result["trajectory"]))
    assert [branch.text for branch in trajectory.blocks[0].branches] == [r["text"] for r in result["results"]]
    assert trajectory.answer == result["answer"].lstrip()
    after = stats(server)
    assert after["trajectories"]["finished"] == before["trajectories"]["finished"] + 1
    assert after["joins"]["text"] == before["joins"]["text"] + 1


def test_a_stream_of_a_fork_has_events_by_branch_and_then_the_result(server: Server):
    body = {"prompt": DOCUMENT, "tasks": TASKS, "budget": {"tokens": 60}, "seed": 1}
    text = post(server, **body, stream=True).text
    *lines, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    *events, last = map(json.loads, lines)
    openapi = requests.get(f"{server.url}/openapi.json", timeout=30).json()
    for event in (*events, last):
        validator(openapi, "AprForkEvent").validate(event)
    assert last["event"] == "fork_result"
    trajectory = apr.rebuild(map(event_from_json, events))
    unstreamed = post(server, **body).json()
    assert [r["text"] for r in last["results"]] == [r["text"] for r in unstreamed["results"]]
    assert trajectory.text == apr.Trajectory.from_json(json.dumps(unstreamed["trajectory"])).text
    for number, result in enumerate(last["results"], 1):
        deltas = [e["text"] for e in events if e["event"] == "delta" and e["path"] == [1, number]]
        assert "".join(deltas).endswith(result["text"])


def test_python_and_http_return_the_same(server: Server):
    async def fork(engine: Any, **options: Any) -> apr.ForkResult:
        tasks = [apr.ForkTask(**task) if isinstance(task, dict) else task for task in TASKS]
        return await apr.fork(
            engine, CHAT, tasks, "Write it down.", budget={"tokens": 120}, temperature=0, **options
        )

    async def over_http() -> apr.ForkResult:
        async with await apr.HttpEngine.connect(server.url) as engine:
            return await fork(engine)

    result = asyncio.run(over_http())
    check_sharing(
        [{"usage": {"cached_tokens": r.usage.cached_tokens}} for r in result.results], result.shared_tokens
    )
    body = {"messages": CHAT, "tasks": TASKS, "merge": "Write it down.", "budget": {"tokens": 120}}
    assert [r["text"] for r in post(server, **body).json()["results"]] == [r.text for r in result.results]


def test_a_merge_in_the_kv_cache_computes_only_its_own_prompt(server: Server):
    body = {"messages": CHAT, "tasks": TASKS, "budget": {"tokens": 90, "branch_tokens": 20}}
    result = post(server, **body, merge={"prompt": "Write it down.", "join": "kv"}).json()
    merge = result["merge"]
    assert [join["by"] for join in result["trajectory"]["joins"]] == ["kv"], result["trajectory"]["joins"]
    tail = next(span for span in result["trajectory"]["spans"] if span["role"] == "tail")
    assert merge["usage"]["cached_tokens"] >= merge["usage"]["prompt_tokens"] - len(tail["token_ids"]) - 1
    assert merge["usage"]["output_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": DOCUMENT, "tasks": []}, "tasks has 0 tasks, expected 1 to 256"),
        ({"prompt": "", "tasks": ["a"]}, "expected one prompt"),
        ({"input_ids": [10**9], "tasks": ["a"]}, "vocabulary"),
        ({"messages": [{"role": "user", "content": "x" * 250_000}], "tasks": ["a"]}, "the prompt has 250007 tokens, expected fewer than the 8192"),
        ({"prompt": "p", "tasks": ["a", "b" * 250_000]}, "the prompt of task 2 has 250001 tokens, expected fewer than the 8192"),
        ({"prompt": "p", "tasks": ["a"], "budget": {"calls": 1}}, "budget calls=1, expected at least 2"),
        ({"prompt": "p", "tasks": [{"prompt": "a", "tools": ["search"]}]}, "tool"),
        ({"prompt": "p " * 20000, "tasks": ["a"]}, "expected at most"),
    ],
    ids=["no task", "no prompt", "wrong ids", "long messages", "long task", "few calls", "no tools", "long prompt"],
)  # fmt: skip
def test_a_wrong_fork_gets_an_error_that_says_what_was_expected(server: Server, body: dict, message: str):
    response = post(server, **body)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_client_that_disconnects_ends_all_workers(server: Server):
    before = stats(server)
    body = {
        "prompt": DOCUMENT,
        "tasks": [f"Task {k}." for k in range(6)],
        "budget": {"tokens": 4096},
        "temperature": 1,
    }
    stream = requests.post(server.url + PATH, json={**body, "stream": True}, stream=True, timeout=60)
    next(stream.iter_lines())
    stream.close()
    with pytest.raises(requests.Timeout):
        requests.post(server.url + PATH, json=body, timeout=0.3)

    def is_idle() -> bool:
        now = stats(server)
        load = requests.get(f"{server.url}/v1/loads", timeout=30).json()["loads"][0]
        ended = now["trajectories"]["cancelled"] - before["trajectories"]["cancelled"]
        return ended == 2 and now["running"] == 0 and load["num_running_reqs"] == 0

    until(is_idle, 20)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_context_of_20000_tokens_is_computed_once_for_8_workers(
    forked_server: type[Server], tmp_path: Path
):
    """Every worker finds all that the prompts have in common, whether or not the conversation is warm."""
    random_llama(tmp_path, eos_bias=3.0, context=32768)
    options = {"max_total_tokens": 65536, "context_length": 32768}
    messages = [
        {"role": "user", "content": long_text(20000)},
        {"role": "assistant", "content": "I have read it."},
    ]
    tasks = [apr.ForkTask(f"Report part {k}.", max_tokens=16) for k in range(8)]

    async def run(url: str) -> list[apr.ForkResult]:
        async with await apr.HttpEngine.connect(url, timeout=300) as engine:
            return [
                await apr.fork(engine, messages, tasks, apr.Merge("Summarize.", max_tokens=16), seed=k)
                for k in (1, 2)
            ]

    with forked_server(tmp_path, log_path=tmp_path / "log", **options) as server:
        started = time.monotonic()
        cold, warm = asyncio.run(run(server.url))
        print(f"{cold.shared_tokens} tokens, {time.monotonic() - started:.1f} s")
    for result in (cold, warm):
        assert result.shared_tokens >= 20000
        for worker in result.results:
            assert worker.usage.cached_tokens is not None
            assert worker.usage.cached_tokens >= result.shared_tokens - 1
        assert result.merge is not None
        assert (result.merge.usage.cached_tokens or 0) >= 20000
    commits = [call for call in warm.trajectory.calls if call.phase == "commit"]
    assert [call.cached_tokens for call in commits] == [warm.shared_tokens - 1]
    computed = sum(c.prompt_tokens - (c.cached_tokens or 0) for c in cold.trajectory.calls)
    assert computed < cold.shared_tokens + 8 * 60 + 800, "the context is computed once"


def long_text(tokens: int) -> str:
    """A text of at least so many tokens of the random model."""
    words = "The model thinks about the problem, and each part becomes a branch with a number. "
    return "".join(f"{k}: {words}" for k in range(tokens // 29))
