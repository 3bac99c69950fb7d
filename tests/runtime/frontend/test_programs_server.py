"""Forks and further turns of programs on a real server: what is computed once, and what the next turn finds."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.interpreter import ProgramState

import sgl_apr as apr
from sgl_apr.runtime.frontend.token_ledger import TOKENS_VARIABLE, ProgramTokens
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import random_llama
from sgl_apr.trajectory.causal_graph import context_layout
from sgl_apr.trajectory.join_layout import token_count

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

BUDGET = apr.Budget(tokens=300, width=3, branch_tokens=40, outline_chars=12)
DIALECTS = {"text": "threadweaver", "kv": "multiverse"}


@pytest.fixture(scope="module")
def endpoint(server: Server) -> Iterator[apr.Endpoint]:
    with apr.Endpoint(server.url) as endpoint:
        yield endpoint


def thinking(name: str, join: str, **options: Any) -> sgl.lang.ir.SglGen:
    options = {"mode": "parallel", "max_blocks": 1, "budget": BUDGET, "temperature": 1.0, **options}
    return apr.reason(name, DIALECTS[join], join=join, **options)


def trajectory_of(meta: dict[str, Any]) -> apr.Trajectory:
    return meta["trajectory"]  # type: ignore[no-any-return]


def tokens_of(state: ProgramState) -> ProgramTokens:
    state.sync()
    return state.stream_executor.variables[TOKENS_VARIABLE]  # type: ignore[no-any-return]


def check_fork(endpoint: apr.Endpoint, text: str, children: int) -> tuple[int, float]:
    """Fork a program that has generated nothing; return the tokens that the children share, and the seconds."""

    @sgl.function
    def forking(s):
        s += text
        for i, part in enumerate(parts := s.fork(children)):
            part += f"\nPart {i}:" + sgl.gen("part", max_tokens=4, temperature=0)
        parts.join("gather_variable")

    started = time.monotonic()
    state = forking.run(backend=endpoint)
    metas = state.get_meta_info("part")
    shared = len(tokens_of(state).ids)
    assert len(metas) == children
    for meta in metas:
        assert meta["prompt_tokens"] > shared
        assert meta["cached_tokens"] >= shared - 1
    return shared, time.monotonic() - started


@pytest.mark.parametrize("children", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_a_program_that_forks_at_once_computes_what_it_shares_once(endpoint: apr.Endpoint, children: int):
    shared, _ = check_fork(endpoint, f"{children} children, and the same text for all. " * 40, children)
    assert shared > 400


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_context_of_20000_tokens_is_computed_once_for_8_children(
    forked_server: type[Server], tmp_path: Path
):
    random_llama(tmp_path, eos_bias=3.0, context=32768)
    options = {"max_total_tokens": 65536, "context_length": 32768}
    with (
        forked_server(tmp_path, log_path=tmp_path / "log", **options) as server,
        apr.Endpoint(server.url, timeout=300) as endpoint,
    ):
        shared, seconds = check_fork(endpoint, "The same long text for all. " * 1600, 8)
    print(f"{shared} tokens, {seconds:.1f} s")
    assert shared >= 20000


# Further turns


@pytest.mark.parametrize("join", [pytest.param("text", marks=pytest.mark.slow), "kv"])
def test_the_second_turn_finds_the_first_in_the_cache(endpoint: apr.Endpoint, join: str):
    @sgl.function
    def conversation(s):
        s += sgl.user(f"First question, of a {join} join?")
        s += sgl.assistant(thinking("first", join))
        s += sgl.user("Second question?")
        s += sgl.assistant(thinking("second", join) + " Then " + sgl.gen("more", max_tokens=4, temperature=0))
        s += sgl.user("Third question?")
        s += sgl.assistant(thinking("third", join))

    state = conversation.run(backend=endpoint)
    first, second, third = (trajectory_of(state.get_meta_info(n)) for n in ("first", "second", "third"))
    assert len(first.blocks) == len(second.blocks) == len(third.blocks) == 1
    assert {j.by for t in (first, second, third) for j in t.joins} == ({"kv"} if join == "kv" else set())
    for before, after in ((first, second), (second, third)):
        context = before.context_ids
        assert after.spans[0].token_ids[: len(context)] == context
        cached = after.calls[0].cached_tokens
        print(f"{join}: {cached} of {len(context)}")
        assert cached >= 0.95 * len(context)
        assert cached >= len(context) - 2
    more = state.get_meta_info("more")
    assert more["cached_tokens"] >= len(second.context_ids) - 2, "a gen continues from there, too"


@pytest.mark.slow
@pytest.mark.parametrize("join", DIALECTS)
@pytest.mark.parametrize("stream", [False, True])
def test_forks_after_a_reason_share_what_it_joined(endpoint: apr.Endpoint, join: str, stream: bool):
    @sgl.function
    def forking(s):
        s += f"A plan, {join} {stream}: " + thinking("plan", join)
        s += "\nAnd now in parts, each of which has the same text before it:\n"
        for i, part in enumerate(parts := s.fork(3)):
            part += f"{i} " + sgl.gen("note", max_tokens=3, temperature=0) + "\n" + thinking("part", join)
        parts.join("gather_variable")

    state = forking.run(backend=endpoint, stream=stream)
    "".join(state.text_iter())
    shared = len(tokens_of(state).ids)
    assert len(trajectory_of(state.get_meta_info("plan")).blocks) == 1
    for note, part in zip(state.get_meta_info("note"), state.get_meta_info("part"), strict=True):
        assert note["cached_tokens"] >= shared - 1
        assert trajectory_of(part).calls[0].cached_tokens >= note["prompt_tokens"] - 1
        assert len(trajectory_of(part).blocks) == 1
        apr.dialect(DIALECTS[join]).validate(trajectory_of(part).text)


def test_what_the_cache_has_lost_is_committed_again(endpoint: apr.Endpoint, server: Server):
    @sgl.function
    def conversation(s):
        s += "Before the flush: " + thinking("first", "kv")
        assert s["first"] is not None
        urllib.request.urlopen(f"{server.url}/flush_cache", b"").close()
        s += "\nSo " + sgl.gen("after", max_tokens=4, temperature=0)
        s += "\nThen " + thinking("second", "kv")

    state = conversation.run(backend=endpoint)
    first, second = (trajectory_of(state.get_meta_info(n)) for n in ("first", "second"))
    joined = token_count(context_layout(first) or ())
    assert joined > 20
    assert state.get_meta_info("after")["cached_tokens"] >= joined - 1, (
        "all that is joined, and not what follows"
    )
    assert {j.by for j in second.joins} == {"kv"}
    assert second.calls[0].cached_tokens >= len(first.context_ids)


@pytest.mark.slow
def test_gens_that_cannot_continue_a_join_read_text(endpoint: apr.Endpoint):
    @sgl.function
    def program(s):
        s += "Several ways: " + thinking("first", "kv")
        s += " It is" + sgl.select("which", [" the number", " x"])
        s += sgl.gen("scored", max_tokens=4, return_logprob=True, temperature=0)
        s += sgl.gen("several", max_tokens=4, n=2, temperature=1.0)
        s += "\nThen " + thinking("second", "kv")

    state = program.run(backend=endpoint)
    assert state["which"] in (" the number", " x")
    assert len(state["several"]) == 2
    assert state.get_meta_info("scored")["output_token_logprobs"]
    first, second = (trajectory_of(state.get_meta_info(n)) for n in ("first", "second"))
    assert second.calls[0].cached_tokens >= len(first.context_ids) - 2


# Tools


@pytest.mark.slow
def test_tools_run_in_programs_and_in_their_forks(endpoint: apr.Endpoint):
    threads: dict[str, set[str]] = {"look_up": set(), "measure": set()}

    def look_up(word: str) -> str:
        """Look a word up, blocking."""
        threads["look_up"].add(threading.current_thread().name)
        time.sleep(0.05)
        return f"{word} is a word"

    async def measure(length: int) -> str:
        """Measure a length."""
        threads["measure"].add(threading.current_thread().name)
        await asyncio.sleep(0.01)
        return f"{length} cm"

    tools = [look_up, measure]
    options = {"tools": tools, "tool_call_parser": "qwen25", "tool_choice": "required", "mode": "sequential"}
    budget = apr.Budget(tokens=900, tool_calls=3)

    @sgl.function
    def program(s):
        s += "Question: " + apr.reason("first", "threadweaver", budget=budget, temperature=1.0, **options)
        for i, part in enumerate(parts := s.fork(2)):
            part += f"\n{i} " + apr.reason("part", "threadweaver", budget=budget, temperature=1.0, **options)
        parts.join("gather_variable")
        s += "\nEnd" + sgl.gen("end", max_tokens=2)

    states = program.run_batch([{}] * 3, backend=endpoint)
    trajectories = [
        trajectory_of(meta) for s in states for meta in (s.get_meta_info("first"), *s.get_meta_info("part"))
    ]
    calls = [call for trajectory in trajectories for call in trajectory.tool_calls]
    assert calls, "a random model may write text up to its limit"
    assert {call.outcome for call in calls} <= {"ok", "length"}, calls
    assert all(isinstance(s["end"], str) for s in states)
    assert threads["measure"] <= {"apr-endpoint"}, "in the event loop of the endpoint"
    assert not any(name == "apr-endpoint" for name in threads["look_up"]), "which blocking tools do not stop"
