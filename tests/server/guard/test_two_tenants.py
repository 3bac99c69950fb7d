"""Two clients of one server: whatever one sends, the other gets the same bytes in time."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time

import httpx
import pytest

from sgl_apr.server.launch.launcher import Server
from tests.server.guard.hostile import half_sent, half_sent_headers, refused

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

PROMPTS = ["Why do people love dogs?", "A question:", "1 2 3", "the end"]
JSON = {"content-type": "application/json"}


async def honest(client: httpx.AsyncClient, count: int) -> tuple[list[str], list[float]]:
    """Send greedy requests one after the other. Returns the answers, and how long each took."""
    answers, seconds = [], []
    for prompt in itertools.islice(itertools.cycle(PROMPTS), count):
        begin = time.perf_counter()
        response = await client.post(
            "/generate", json={"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
        )
        seconds.append(time.perf_counter() - begin)
        assert response.status_code == 200, response.text
        answers.append(response.json()["text"])
    return answers, seconds


async def hostile(client: httpx.AsyncClient, count: int) -> list[tuple[str, int]]:
    """Send refused requests, eight at once. Returns the status of each by its name."""
    kinds = list(refused().items())
    random.Random(0).shuffle(kinds)
    queue = iter(list(itertools.islice(itertools.cycle(kinds), count)))
    results = []

    async def sender() -> None:
        for name, (path, content) in queue:
            response = await client.post(path, content=content, headers=JSON)
            results.append((name, response.status_code))

    await asyncio.gather(*(sender() for _ in range(8)))
    return results


@pytest.mark.parametrize("count", [62, pytest.param(500, marks=pytest.mark.slow)])
def test_hostile_requests_change_and_delay_nothing_of_another_client(server: Server, count: int):
    async def go() -> None:
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=60) as tenant,
            httpx.AsyncClient(base_url=server.url, timeout=60) as attacker,
        ):
            await honest(tenant, len(PROMPTS))  # the prompts are in the cache afterwards, in both runs
            alone, seconds = await honest(tenant, 12)
            usual = statistics.median(seconds)
            sockets = [half_sent(server.url) for _ in range(20)] + [
                half_sent_headers(server.url) for _ in range(20)
            ]
            attack = asyncio.create_task(hostile(attacker, count))
            answers, waited = [], []
            while not attack.done() or len(answers) < len(alone):
                some, took = await honest(tenant, 4)
                answers += some
                waited += took
            results = await attack
            for connection in sockets:
                connection.close()
        delay = max(waited) - usual
        print(
            f"\n{count} hostile requests: {len(waited)} honest ones, usually {usual:.3f} s, delayed by {delay:.3f} s at most"
        )
        wrong = {(name, status) for name, status in results if not 400 <= status < 500}
        assert not wrong
        assert len(results) == count
        assert answers == list(itertools.islice(itertools.cycle(alone[:4]), len(answers)))
        assert delay < 1

    asyncio.run(go())
