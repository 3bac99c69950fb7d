"""Tools of `apr.reason` in programs: where they run, and what an endpoint does about one that never ends."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress

import pytest
import sglang as sgl

import sgl_apr as apr
from sgl_apr.runtime.frontend import event_loop
from tests.support.fake_sglang_server import TOKENIZER, SglangServer

pytestmark = [pytest.mark.timeout(60)]


def reason(name: str, **options) -> sgl.lang.ir.SglGen:
    return apr.reason(name, **{"budget": apr.Budget(tokens=400), **options})


class CallingServer(SglangServer):
    """Calls each tool once before it answers; in forks it does the same."""

    def __init__(self, *tools: str) -> None:
        super().__init__()
        self.calls = [
            f'<tool_call>\n{{"name": "{tool}", "arguments": {{"word": "a"}}}}\n</tool_call>' for tool in tools
        ]

    def reply(self, phase: str, prompt: str) -> str:
        turn = prompt.rpartition("Q")[2].count("<tool_response>")
        return super().reply(phase, prompt) if phase == "commit" else [*self.calls, "Done."][turn]


def test_tools_run_in_programs_and_in_forks():
    threads: dict[str, set[str]] = {}

    def note(tool: str) -> None:
        threads.setdefault(tool, set()).add(threading.current_thread().name)

    def blocking(word: str) -> str:
        """Ask another program, and wait for it."""
        note("blocking")
        return f"{word}: {plain.run(backend=endpoint)['answer']}"

    async def asynchronous(word: str) -> str:
        """Wait a little."""
        note("asynchronous")
        await asyncio.sleep(0.01)
        return f"{word}: waited"

    async def waiting(word: str) -> str:
        """Wait in the event loop for what it runs."""
        return str(plain.run(backend=endpoint)["answer"])

    @sgl.function
    def plain(s):
        s += "P: " + sgl.gen("answer", max_tokens=3)

    tools = [blocking, asynchronous, waiting]
    options = {"tools": tools, "tool_call_parser": "qwen25", "budget": apr.Budget(tokens=4000)}

    @sgl.function
    def program(s):
        s += "Q1: " + reason("first", **options)
        for i, part in enumerate(parts := s.fork(2)):
            part += f" Q2 {i}: " + reason("part", **options)
        parts.join("gather_variable")
        s += " Q3: " + sgl.gen("end", max_tokens=3)

    fake = CallingServer("blocking", "asynchronous", "waiting")
    with fake.in_thread() as url, apr.Endpoint(url, tokenizer=TOKENIZER) as endpoint:
        state = program.run(backend=endpoint)
        assert (state["first"], state["part"], state["end"]) == ("Done.", ["Done."] * 2, "gen")
        for meta in (state.get_meta_info("first"), *state.get_meta_info("part")):
            ended = meta["trajectory"].tool_calls
            assert [(c.name, c.outcome) for c in ended] == [
                ("blocking", "ok"), ("asynchronous", "ok"), ("waiting", "error")
            ]  # fmt: skip
            assert [c.result for c in ended[:2]] == ["a: gen", "a: waited"]
            assert "waits for a program of the same apr.Endpoint" in ended[2].result
        assert fake.rendered == 1, "the form of results is the same for all expressions"
        assert threads["asynchronous"] == {"apr-endpoint"}
        assert "apr-endpoint" not in threads["blocking"]


def test_an_endpoint_closes_although_a_tool_never_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(event_loop, "DRAIN_TIMEOUT_S", 0.2)
    started, may_end = threading.Event(), threading.Event()

    async def stubborn(word: str) -> str:
        """Refuse to be cancelled."""
        started.set()
        while not may_end.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        return word

    @sgl.function
    def program(s):
        s += "Q: " + reason("answer", tools=[stubborn], tool_call_parser="qwen25")

    with CallingServer("stubborn").in_thread() as url:
        endpoint = apr.Endpoint(url, tokenizer=TOKENIZER)
        state = program.run(backend=endpoint, stream=True)
        assert started.wait(10)
        before = time.monotonic()
        closing = threading.Thread(target=endpoint.close)
        closing.start()
        closing.join(5)
        may_end.set()
        assert not closing.is_alive()
        assert time.monotonic() - before < 5
        with pytest.raises(apr.EngineError, match="the program was cancelled"):
            _ = state["answer"]
