"""Groups of workers on a real server, through the engine and `/apr/generate`: greedy tokens, errors, aborts, events."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
import requests

import sgl_apr as apr
from sgl_apr.engine.base import GroupRequest, Request, Result
from sgl_apr.methods import decode_group
from sgl_apr.runtime.event_json import event_from_json
from sgl_apr.server.launch.launcher import Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
KINDS = ("group_think", "hogwild")
PROMPT = tuple(range(40, 70))
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def group_of(kind: Any, name: str, *max_tokens: int, **options: Any) -> GroupRequest:
    requests_ = tuple(
        Request(f"apr-{name}-{k}", (*PROMPT, 71 + k, 90), tokens, GREEDY, **options)
        for k, tokens in enumerate(max_tokens)
    )
    return GroupRequest(kind, requests_, len(PROMPT), None)


def on_engine(server: Server, work: Any) -> Any:
    async def run() -> Any:
        async with await apr.HttpEngine.connect(server.url) as engine:
            result = await work(engine)
            for _ in range(50):  # an aborted request ends a step later, and a load is reported twice a second
                if (await engine.load()).running == 0:
                    return result
                await asyncio.sleep(0.2)
            raise AssertionError("workers are left")

    return asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_workers_of_other_lengths_end_on_their_own(server: Server, kind: str):
    arrived: list[list[int]] = [[], [], []]
    ends: list[int] = []

    async def work(engine: apr.HttpEngine) -> Any:
        assert set(KINDS) == set(engine.groups)
        group = group_of(kind, f"len{kind}", 12, 3, 7, logprobs=True)
        await engine.commit(Request(f"apr-len{kind}-c", PROMPT))
        return await engine.group(group, [a.extend for a in arrived], lambda k, _: ends.append(k))

    results = on_engine(server, work)
    assert [len(r.token_ids) for r in results] == [12, 3, 7]
    assert [len(r.logprobs) for r in results] == [12, 3, 7]
    assert [list(r.token_ids) for r in results] == arrived
    assert all(r.finish == "length" and r.prompt_tokens == len(PROMPT) + 2 for r in results)
    assert all(r.cached_tokens >= len(PROMPT) - 1 for r in results)
    assert ends == [1, 2, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_they_see_each_other(server: Server, kind: str):
    """Greedy, the same worker writes something else with another neighbour, and the same with the same one."""

    async def work(engine: apr.HttpEngine) -> Any:
        pair = group_of(kind, f"see{kind}1", 24, 24)
        again = group_of(kind, f"see{kind}2", 24, 24)
        other = group_of(kind, f"see{kind}3", 24, 24)
        first, second = other.requests
        neighbour = Request(second.rid, (*PROMPT, 5, 6, 7, 8, 9), 24, GREEDY)
        other = GroupRequest(other.kind, (first, neighbour), len(PROMPT))
        return [(await engine.group(group))[0].token_ids for group in (pair, again, other)]  # type: ignore[union-attr]

    one, same, changed = on_engine(server, work)
    assert one == same
    assert one != changed


@pytest.mark.parametrize("kind", KINDS)
def test_groups_whose_grammars_are_not_ready_wait_for_all_of_their_workers(server: Server, kind: str):
    """The grammars of workers become ready one by one, while other groups run."""

    async def work(engine: apr.HttpEngine) -> Any:
        groups = []
        for number in range(8):
            group = group_of(kind, f"grammar{kind}{number}", 12, 12, 12)
            grammars = [f"start: /[a-z]{{{2 + number},{12 + k}}}[0-9]+/\n" for k in range(3)]
            requests_ = [replace(r, grammar=g) for r, g in zip(group.requests, grammars, strict=True)]
            groups.append(replace(group, requests=tuple(requests_)))
        return await asyncio.wait_for(asyncio.gather(*map(engine.group, groups)), 60)

    outcomes = on_engine(server, work)
    assert all(
        isinstance(result, Result) and len(result.token_ids) >= 1 for group in outcomes for result in group
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_worker_is_aborted(server: Server, kind: str):
    async def work(engine: apr.HttpEngine) -> Any:
        group, aborting = group_of(kind, f"abort{kind}", 60, 400), list[asyncio.Task[None]]()
        received: list[int] = []

        def abort(ids: Any) -> None:
            received.extend(ids)
            if not aborting:
                aborting.append(asyncio.create_task(engine.abort(group.requests[1].rid)))

        return await engine.group(group, [None, abort]), received

    (first, second), received = on_engine(server, work)
    assert isinstance(first, Result)
    assert len(first.token_ids) == 60
    assert isinstance(second, apr.EngineError)
    assert 1 <= len(received) < 400


def test_what_a_server_refuses_is_one_error(server: Server):
    async def work(engine: apr.HttpEngine) -> Any:
        with pytest.raises(apr.EngineError, match=r"worker group: .*context") as refused:
            await engine.group(group_of("group_think", "long", 5000, 5000))
        return refused.value.status

    assert on_engine(server, work) == 400


@pytest.mark.parametrize("kind", KINDS)
def test_a_deadline_and_a_cancelled_call_leave_nothing(server: Server, kind: str):
    async def work(engine: apr.HttpEngine) -> Any:
        no_end = {str(i): -100.0 for i in engine.tokenizer.eos_ids}
        options = {"budget": apr.Budget(tokens=3000, seconds=1.0), "temperature": 0.0, "logit_bias": no_end}
        started = asyncio.get_running_loop().time()
        trajectory = await decode_group(engine, PROMPT, kind, ["A: ", "B: "], **options)  # type: ignore[arg-type]
        assert asyncio.get_running_loop().time() - started < 5
        return trajectory

    trajectory = on_engine(server, work)
    assert [branch.finish for branch in trajectory.blocks[0].branches] == ["timeout"] * 2
    assert {limit.limit for limit in trajectory.limits} == {"seconds"}
    assert trajectory.metrics().decoded_tokens > 0


@pytest.mark.parametrize("kind", KINDS)
def test_over_apr_generate(server: Server, kind: str):
    group = {"kind": kind, "headers": ["A: ", "B: ", "C: "]}
    body = {"prompt": "Question: ", "group": group, "budget": {"tokens": 60}, "temperature": 0, "seed": 1}
    whole = requests.post(f"{server.url}/apr/generate", json=body, timeout=60)
    trajectory = apr.Trajectory.from_json(whole.text)
    assert [b.number for b in trajectory.blocks[0].branches] == [1, 2, 3]
    assert trajectory.metrics().total <= 60
    streamed = requests.post(f"{server.url}/apr/generate", json={**body, "stream": True}, timeout=60).text
    events = [
        event_from_json(json.loads(line.removeprefix("data: ")))
        for line in streamed.split("\n\n")
        if line.startswith("data: {")
    ]
    again = apr.rebuild(events)
    assert [s.token_ids for s in again.spans] == [s.token_ids for s in trajectory.spans]
    assert again.groups == trajectory.groups
    deltas = [e.path for e in events if isinstance(e, apr.Delta)]
    assert len(set(deltas[3:15])) == 3, "workers write in turns"
    refused = requests.post(f"{server.url}/apr/generate", json={**body, "mode": "parallel"}, timeout=60)
    assert refused.status_code == 400
    assert "no option 'mode'" in refused.json()["error"]["message"]
    assert requests.get(f"{server.url}/apr/stats", timeout=30).json()["groups"] == sorted(KINDS)
