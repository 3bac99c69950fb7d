"""Two clients of one server: whatever one sends, the other gets the same bytes in time."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time

import httpx
import psutil
import pytest

from sgl_apr.server.launch.launcher import Server
from tests.server.guard.hostile import half_sent, half_sent_headers, refused
from tests.support.processes import CoreWait, in_session

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

PROMPTS = ["Why do people love dogs?", "A question:", "1 2 3", "the end"]
JSON = {"content-type": "application/json"}


async def honest(client: httpx.AsyncClient, pid: int, count: int) -> tuple[list[str], list[float]]:
    """Send greedy requests one after the other.

    Returns:
        The answers, and how long each took. Seconds for which the process of the event loop waited for a core, because
        other programs use all of them, do not count.
    """
    answers, seconds = [], []
    for prompt in itertools.islice(itertools.cycle(PROMPTS), count):
        waiting, begin = CoreWait(pid), time.perf_counter()
        response = await client.post(
            "/generate", json={"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
        )
        seconds.append(time.perf_counter() - begin - waiting.seconds())
        assert response.status_code == 200, response.text
        answers.append(response.json()["text"])
    return answers, seconds


async def hostile(url: str, count: int) -> list[tuple[str, int]]:
    """Send refused requests, eight at once. Returns the status of each by its name."""
    kinds = list(refused().items())
    random.Random(0).shuffle(kinds)
    queue = itertools.islice(itertools.cycle(kinds), count)
    results = []

    async def sender(client: httpx.AsyncClient) -> None:
        for name, (path, content) in queue:
            response = await client.post(path, content=content, headers=JSON)
            results.append((name, response.status_code))

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        await asyncio.gather(*(sender(client) for _ in range(8)))
    return results


def memory(server: Server) -> float:
    """Return the MB of memory that the processes of a server have."""
    return sum(psutil.Process(pid).memory_info().rss for pid in in_session(server.pid)) / 2**20


@pytest.mark.parametrize("count", [len(refused()), pytest.param(500, marks=pytest.mark.slow)])
def test_hostile_requests_change_and_delay_nothing_of_another_client(server: Server, count: int):
    async def go() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as tenant:
            # The prompts are in the cache afterwards, in both runs.
            await honest(tenant, server.pid, len(PROMPTS))
            alone, seconds = await honest(tenant, server.pid, 12)
            used = memory(server)
            sockets = [half_sent(server.url) for _ in range(20)]
            sockets += [half_sent_headers(server.url) for _ in range(20)]
            # In a thread, so that the work of the attacker does not delay this client itself.
            attack = asyncio.create_task(asyncio.to_thread(asyncio.run, hostile(server.url, count)))
            answers, waited = [], []
            while not attack.done() or len(answers) < len(alone):
                some, took = await honest(tenant, server.pid, 4)
                answers += some
                waited += took
            results = await attack
            for connection in sockets:
                connection.close()
        delay, growth = max(waited) - statistics.median(seconds), memory(server) - used
        print(
            f"\n{count} hostile requests, {len(waited)} honest ones: usually {statistics.median(seconds):.3f} s, "
            f"delayed by {delay:.3f} s at most; memory grew by {growth:.0f} MB"
        )
        assert {(name, status) for name, status in results if not 400 <= status < 500} == set()
        assert len(results) == count
        assert answers == list(itertools.islice(itertools.cycle(alone[:4]), len(answers)))
        assert delay < 1
        assert growth < 300

    asyncio.run(go())


def test_a_page_of_another_site_gets_nothing(server: Server):
    """SGLang itself lets every origin read every answer, with credentials."""
    body = {"text": "a", "sampling_params": {"max_new_tokens": 1}}
    foreign = httpx.post(f"{server.url}/generate", json=body, headers={"origin": "https://evil.example"})
    own = httpx.post(f"{server.url}/generate", json=body, headers={"origin": server.url})
    preflight = httpx.options(
        f"{server.url}/generate",
        headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
    )
    assert (foreign.status_code, own.status_code, preflight.status_code) == (403, 200, 403)
    for response in (foreign, own, preflight):
        assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize("name", ["tools that are numbers", "sampling_params that are numbers"])
def test_a_body_with_many_errors_gets_a_short_response(server: Server, name: str):
    """SGLang itself lists each of them twice, in a response of tens of megabytes."""
    path, content = refused()[name]
    response = httpx.post(f"{server.url}{path}", content=content, headers=JSON, timeout=60)
    assert response.status_code == 400
    assert len(response.content) < 50_000
    assert "the body has many errors, of which at most 20 are listed" in response.text
    assert name.partition(" ")[0] in response.text


def test_unknown_sections_of_the_load_are_refused(server: Server):
    """SGLang itself answers them with status 500."""
    for include in ("v", "core,v", ",", "\0", "core,\U000ab33c"):
        response = httpx.get(f"{server.url}/v1/loads", params={"include": include})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "include"
        assert "expected some of all, core, disagg, lora, memory, queues, spec" in error["message"]
    for query in (
        {},
        {"include": ""},
        {"include": "core, memory"},
        {"include": "all,v"},
        {"include": ["v", "core"]},
    ):
        response = httpx.get(f"{server.url}/v1/loads", params=query)
        assert response.status_code == 200
        assert response.json()["loads"][0]["num_running_reqs"] == 0


def test_values_at_the_limits_are_answered(server: Server):
    """What SGLang takes is still taken."""
    sampling = {
        "max_new_tokens": 2,
        "top_k": 2**31 - 1,
        "stop": ["zzz"],
        "stop_token_ids": [1],
        "logit_bias": {"5": 1.0},
    }
    many = {
        "text": ["a"] * 3,
        "sampling_params": sampling,
        "return_logprob": True,
        "top_logprobs_num": [1, 2, 3],
    }
    for fields in (
        many,
        {"text": ["a"] * 3, "sampling_params": {"n": 2, "max_new_tokens": 1}},
        {"text": "a", "sampling_params": {"max_new_tokens": None, "stop": "e", "regex": "[a-c]+"}},
        {"text": ["a", "b"], "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 2}], "rid": ["guard-a", "guard-b"]},
        {"input_ids": [[1], [2, 3]], "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0},
        {"text": "a", "sampling_params": {"max_new_tokens": 2, "custom_params": {"a": [1, "b"]}}, "session_params": None},
    ):  # fmt: skip
        response = httpx.post(f"{server.url}/generate", json=fields, timeout=60)
        assert response.status_code == 200, response.text
