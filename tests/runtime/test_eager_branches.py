"""Branches that start while their fork is still being written: they write the same, earlier, and leave nothing running."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

import sgl_apr as apr
from sgl_apr.engine.scripted import Reply
from tests.runtime.test_shared_tokens import SeededEngine
from tests.support import virtual_time
from tests.support.masked_sampler import masked

SPAWN = apr.dialect("spawn")
FORK = "Go. <Spawn>\n<Message>1:left</Message>\n<Message>2:right side</Message>\n</Spawn>"
REPLIES = {
    "left": "goes left <Return>L</Return>",
    "right side": "goes to the right <Return>R</Return>",
}


def reply(prompt: str, delay: float = 1.0) -> Reply:
    if prompt in REPLIES:
        return Reply(REPLIES[prompt], delay=delay)
    return Reply("Done." if "<Join>" in prompt else FORK, delay=delay)


class TimedEngine(apr.ScriptedEngine):
    """Notes when each request was sent."""

    def __init__(self, script=lambda request, prompt: reply(prompt), **options) -> None:
        super().__init__(script, apr.ByteTokenizer(SPAWN.tags), **options)
        self.sent: list[tuple[float, str]] = []

    async def decode(self, request, on_tokens=None):
        prompt = self.tokenizer.decode(request.input_ids)
        self.sent.append((asyncio.get_running_loop().time(), prompt))
        result = await super().decode(request, on_tokens)
        if not request.logprobs:
            return result
        return replace(result, logprobs=tuple(-float(i) for i in range(len(result.token_ids))))


def run(engine, dialect="spawn", **options) -> tuple[apr.Trajectory, float]:
    return virtual_time.run(apr.areason(engine, "Q: ", dialect, pacing=None, **options))


def counts(t: apr.Trajectory) -> list[int]:
    metrics = t.metrics()
    return [metrics.total, metrics.critical_path, metrics.engine_calls, metrics.decoded_tokens]


def size(text: str) -> int:
    return len(apr.ByteTokenizer(SPAWN.tags).encode(text))


def test_a_branch_starts_as_soon_as_its_outline_is_written():
    (plain, plain_s), (eager, eager_s) = (
        run(engine, eager_branches=value) for engine, value in ((TimedEngine(), False), (TimedEngine(), True))
    )
    assert eager.text == plain.text
    assert eager.spans == plain.spans
    assert counts(eager) == counts(plain)
    engine = TimedEngine()
    run(engine, eager_branches=True)
    first = FORK.index("<Message>2")
    assert [(at, prompt) for at, prompt in engine.sent if prompt in REPLIES] == [
        (size(FORK[:first]), "left"),
        (size(FORK.removesuffix("</Spawn>")), "right side"),
    ]
    assert [call.path for call in eager.calls] == [call.path for call in plain.calls]
    # The second branch takes longest, and starts one token before the fork ends.
    assert eager_s == plain_s - 1
    assert not engine.active


@pytest.mark.parametrize("name", ["apr", "spawn"])
@pytest.mark.parametrize("tokens", [150, 400, 1500])
def test_what_is_written_is_the_same_and_comes_earlier(name: str, tokens: int):
    """Under any budget, with forks in forks, whether or not the first request of a branch turns out as expected."""
    saved, forks = [], 0
    for seed in range(5):
        r = random.Random(seed)
        options = {
            "seed": seed,
            "mode": "parallel" if tokens > 200 else "auto",
            "budget": apr.Budget(tokens=tokens, depth=r.choice([1, 2]), width=r.choice([2, 3, 5])),
        }

        def engine() -> SeededEngine:
            engine = SeededEngine(masked(name), random.Random(0))
            engine.speed.uniform = lambda *_: 0.05
            return engine

        (plain, plain_s), (eager, eager_s) = (
            run(engine(), name, eager_branches=value, **options) for value in (False, True)
        )
        assert eager.text == plain.text
        assert counts(eager) == counts(plain)
        assert {hit.limit for hit in eager.limits} == {hit.limit for hit in plain.limits}
        saved.append(plain_s - eager_s)
        forks += len(plain.blocks)
    assert min(saved) > -1e-6
    if tokens > 200:
        assert forks
        assert max(saved) > 0.05, "a branch that takes longest was listed before others"


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_branch_gets_no_more_than_its_limit(logprobs: bool):
    """What the early request has written above the limit, which is known when the fork is complete, is dropped."""
    long = {"left": "l" * 3000, "right side": "r" * 3000}

    def script(request: apr.Request, prompt: str) -> Reply:
        return Reply(long[prompt], delay=0.001) if prompt in long else reply(prompt)

    options = {"budget": apr.Budget(tokens=1200, branch_tokens=90), "logprobs": logprobs}
    (plain, _), (eager, _) = (
        run(TimedEngine(script), eager_branches=value, **options) for value in (False, True)
    )
    assert eager.text == plain.text
    branches = [call for call in eager.calls if call.path]
    lengths = sorted(call.output_tokens for call in plain.calls if call.path)
    assert sorted(call.output_tokens for call in branches) == lengths
    for call in branches if logprobs else ():
        assert call.logprobs == tuple(-float(i) for i in range(call.output_tokens))


def test_an_early_request_that_fails_is_repeated():
    failed: list[str] = []

    def script(request: apr.Request, prompt: str) -> Reply:
        if prompt == "left" and not failed:
            failed.append(prompt)
            return Reply("goes", error=apr.EngineError("lost"))
        return reply(prompt)

    t, _ = run(TimedEngine(script), eager_branches=True)
    assert t.blocks[0].branches[0].text == "goes left "
    assert {call.path: call.retries for call in t.calls if call.path} == {(1, 1): 1, (1, 2): 0}


def test_an_outline_that_is_written_again_starts_another_branch():
    """The trunk fails after its first outline, and lists others when it is repeated."""
    trunks: list[str] = []

    def script(request: apr.Request, prompt: str) -> Reply:
        if prompt in REPLIES or "<Join>" in prompt:
            return reply(prompt)
        if prompt == "wrong":
            return Reply("never ends", delay=1e6)
        trunks.append(prompt)
        if len(trunks) == 1:
            broken = "Go. <Spawn>\n<Message>1:wrong</Message>\n<Message>"
            return Reply(broken, delay=1.0, error=apr.EngineError("lost"))
        return reply(prompt)

    engine = TimedEngine(script)
    t, seconds = run(engine, eager_branches=True, budget=apr.Budget(calls=20))
    assert [prompt for _, prompt in engine.sent if prompt in {"wrong", *REPLIES}] == ["wrong", *REPLIES]
    assert [branch.text for branch in t.blocks[0].branches] == ["goes left ", "goes to the right "]
    assert seconds < 1000
    assert not engine.active


@pytest.mark.parametrize("at", [25.0, 42.0, 50.0])
def test_a_trajectory_that_is_cancelled_leaves_nothing_running(at: float):
    async def cancelled(engine) -> None:
        async with asyncio.timeout(at):
            await apr.areason(engine, "Q: ", "spawn", pacing=None, eager_branches=True)

    engine = TimedEngine()
    with pytest.raises(TimeoutError):
        virtual_time.run(cancelled(engine))
    assert not engine.active


def test_a_deadline_that_cuts_the_fork_leaves_nothing_running():
    engine = TimedEngine()
    for seconds in (20.0, 30.0, 40.0, 50.0):
        t, _ = run(engine, eager_branches=True, budget=apr.Budget(seconds=seconds))
        SPAWN.validate(t.text)
        assert not engine.active


def test_branches_that_see_the_text_before_them_cannot_start_early():
    engine = apr.ScriptedEngine(lambda request, prompt: "")
    for name in ("threadweaver", "asyncthink", "parathinker"):
        with pytest.raises(apr.AprError, match=rf"{name} starts no branch before its fork is complete"):
            asyncio.run(apr.areason(engine, "Q: ", name, eager_branches=True))

    def tool() -> str:
        """Do nothing."""
        return ""

    with pytest.raises(apr.AprError, match="cannot be combined with tools"):
        asyncio.run(apr.areason(engine, "Q: ", "spawn", eager_branches=True, tools=[tool]))


def test_a_fork_that_has_no_room_stops_what_was_started():
    """Without a grammar the model may list branches where none may start."""
    engine = TimedEngine()
    engine.joins_kv = False
    t, _ = run(engine, eager_branches=True, constrain=False, mode="sequential")
    assert not t.blocks
    assert not [prompt for _, prompt in engine.sent if prompt in REPLIES], "forks are forbidden"
    engine = TimedEngine()
    t, _ = run(engine, eager_branches=True, constrain=False, budget=apr.Budget(width=2, calls=3))
    assert not engine.active
    assert sum(1 for call in t.calls) <= 3


@pytest.mark.parametrize("listens", [False, True])
def test_tokens_that_nobody_waits_for_come_in_chunks(listens: bool):
    engine = TimedEngine()
    engine.default_interval = 1
    on_event = (lambda event: None) if listens else None
    t, _ = run(engine, eager_branches=True, on_event=on_event)
    intervals = [
        request.sampling.get("stream_interval")
        for request in engine.requests
        if engine.tokenizer.decode(request.input_ids) in REPLIES
    ]
    assert intervals == ([None, None] if listens else [16, 16])
    assert [b.text for b in t.blocks[0].branches] == ["goes left ", "goes to the right "]


def test_options_may_be_replaced():
    options = apr.ReasonOptions(SPAWN)
    assert replace(options, eager_branches=True).eager_branches
