"""Requests that continue others where their lease ended: how they are cut, recorded and limited."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.cost_model import EngineCost, predict_speedup
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.session import method_session
from sgl_apr.runtime.allowance import Allowance
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.lease_pool import Lease, LeasePool
from sgl_apr.runtime.pending_leases import PendingLeases
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.trajectory.join_layout import parse_layout
from tests.runtime.test_shared_tokens import SeededEngine
from tests.support import virtual_time
from tests.support.masked_sampler import masked

DIALECT = apr.dialect("threadweaver")
AFTER = "<Conclusion>c</Conclusion>\n</Parallel>\nend"


class Server(apr.ScriptedEngine):
    """Looks for stop texts in what one request decodes, as SGLang does, and counts what runs."""

    running = max_running = 0

    async def decode(self, request: apr.Request, on_tokens=None) -> apr.Result:
        self.running += 1
        self.max_running = max(self.running, self.max_running)
        try:
            return await super().decode(request, on_tokens)
        finally:
            self.running -= 1

    def _limited(self, request: apr.Request, reply: apr.Reply):
        ids: list[int] = []
        for at, i in enumerate(self.tokenizer.encode(reply.text), 1):
            ids.append(i)
            if at <= request.resumed_tokens:
                continue
            text = self.tokenizer.decode(ids[request.resumed_tokens :])
            if i in request.stop_ids or (
                request.stop and request.grammar is None and text.endswith(tuple(request.stop))
            ):
                return tuple(ids), "stop"
            if at == request.resumed_tokens + request.max_tokens:
                return tuple(ids), "length"
        return (*ids, *([min(self.tokenizer.eos_ids)] if reply.end else [])), "stop"


def outlines(count: int) -> str:
    lines = "".join(f"<Outline>{k}: t</Outline>\n" for k in range(1, count + 1))
    return f"<Parallel>\n<Outlines>\n{lines}</Outlines>"


def forked(replies: Sequence[apr.Reply], tags: tuple[str, ...] = DIALECT.tags) -> Server:
    """A reply that forks into branches with these replies."""

    def script(request: apr.Request, prompt: str) -> apr.Reply | str:
        for k, reply in enumerate(replies, 1):
            if prompt.endswith(f"<Thread>\n{k}:"):
                return reply
        return AFTER if prompt.endswith("</Thread>\n") else outlines(len(replies))

    return Server(script, apr.ByteTokenizer(tags))


def branch(length: int, delay: float = 0.01, letter: str = "a") -> apr.Reply:
    return apr.Reply(f" {letter * length}\n</Thread>", delay=delay)


def reason(engine: apr.ScriptedEngine, **options) -> tuple[apr.Trajectory, list[apr.Event]]:
    events: list[apr.Event] = []
    options = {"dialect": DIALECT, "mode": "parallel", **options}
    trajectory, _ = virtual_time.run(apr.areason(engine, "Q\n", on_event=events.append, **options))
    assert apr.rebuild(events) == trajectory
    assert apr.Trajectory.from_json(trajectory.to_json()) == trajectory
    return trajectory, events


def outcomes(trajectory: apr.Trajectory) -> list[str]:
    return [b.outcome for b in trajectory.blocks[0].branches]


def written(events: Sequence[apr.Event], path: tuple[int, ...]) -> str:
    """The text of a sequence as a listener has it."""
    text = ""
    for event in events:
        if isinstance(event, apr.Delta) and event.path == path:
            text += event.text
        elif isinstance(event, apr.TextRetracted) and event.path == path:
            text = "" if event.chars is None else text[: len(text) - event.chars]
    return text


@pytest.mark.parametrize(
    ("limit", "options"),
    [("policy", {"policy": "deadline:20"}), ("seconds", {"budget": {"tokens": 700, "seconds": 20}})],
)
def test_a_branch_that_is_cut_while_it_waits_for_tokens_is_not_cut_by_its_length(limit, options):
    engine = forked([branch(500), branch(60, delay=1.0)])
    trajectory, _ = reason(engine, **{"budget": apr.Budget(tokens=700), **options})
    assert outcomes(trajectory) == ["timeout", "timeout"]
    assert {hit.limit for hit in trajectory.limits if hit.path} == {limit}
    assert not any(call.continuations for call in trajectory.calls)


def test_a_branch_that_is_cut_at_the_moment_of_its_next_lease_counts_no_further_request():
    engine = forked([branch(500), branch(60, delay=1.0)])  # the end of the second is both
    trajectory, _ = reason(engine, budget=apr.Budget(tokens=700), policy="first")
    assert outcomes(trajectory) == ["aborted", "ok"]
    assert trajectory.metrics().engine_calls == len(engine.requests) + len(engine.commits)


@pytest.mark.parametrize(
    ("limit", "budget"),
    [
        ("calls", {"tokens": 900, "calls": 7}),
        ("critical_tokens", {"tokens": 1200, "critical_tokens": 600}),
        ("branch_tokens", {"tokens": 1200, "branch_tokens": 400}),
        ("tokens", {"tokens": 600}),
    ],
)
def test_the_limit_that_acts_after_a_continuation_is_named(limit, budget):
    engine = forked([branch(900), branch(5), branch(5)])
    trajectory, _ = reason(engine, budget=budget)
    assert outcomes(trajectory) == ["length", "ok", "ok"]
    assert [hit.limit for hit in trajectory.limits if hit.path == (1, 1)] == [limit]
    assert any(call.continuations for call in trajectory.calls) == (limit != "calls")


def test_calls_that_ended_branches_have_left_continue_the_others():
    # Two calls for each branch. The first one needs one more, once the others have left theirs.
    engine = forked([branch(520), branch(260), branch(5), branch(5)])
    trajectory, _ = reason(engine, budget=apr.Budget(tokens=1200, calls=14))
    assert outcomes(trajectory) == ["ok"] * 4
    assert [c.continuations for c in trajectory.calls if c.path == (1, 1)] == [2]
    assert trajectory.metrics().engine_calls == len(engine.requests) + len(engine.commits) <= 14


@pytest.mark.parametrize("length", range(300, 312))
def test_a_stop_text_that_a_lease_could_cut_in_two_still_ends_a_branch(length: int):
    """Without a grammar, and with tags that are spelled out."""
    engine = forked([branch(length), branch(5), branch(5)], tags=())
    trajectory, _ = reason(engine, budget=apr.Budget(tokens=1400), constrain=False)
    assert "malformed" not in outcomes(trajectory)
    assert not trajectory.tokens_shared
    tagged, _ = reason(
        forked([branch(length), branch(5), branch(5)]), budget=apr.Budget(tokens=1400), constrain=False
    )
    assert tagged.tokens_shared


def test_a_branch_that_ends_where_its_lease_ends_asks_for_nothing():
    lengths = set[int]()
    for length in range(250, 300):  # one of them ends exactly there
        engine = forked([branch(length), branch(5)], tags=())
        trajectory, _ = reason(engine, budget=apr.Budget(tokens=900))
        assert outcomes(trajectory) == ["ok", "ok"]
        (call,) = (c for c in trajectory.calls if c.path == (1, 1))
        decoded = sum(s.tokens for s in trajectory.spans if s.path == (1, 1) and s.origin == "decoded")
        if not call.continuations and call.output_tokens == decoded:  # no end-of-text token
            lengths.add(length)
            assert not [hit for hit in trajectory.limits if hit.path]
    assert lengths


def test_a_failed_continuation_voids_all_text_of_its_call():
    requests: list[apr.Request] = []

    def script(request: apr.Request, prompt: str) -> apr.Reply | str:
        if prompt.endswith("<Thread>\n1:"):
            requests.append(request)
            error = apr.EngineError("gone", 400) if request.resumed_tokens else None
            return apr.Reply(f" {'é' * 400}", error=error)
        if prompt.endswith("<Thread>\n2:"):
            return branch(5)
        return AFTER if prompt.endswith("</Thread>\n") else outlines(2)

    trajectory, events = reason(
        Server(script, apr.ByteTokenizer(DIALECT.tags)), budget=apr.Budget(tokens=900)
    )
    assert len(requests) == 2
    assert outcomes(trajectory) == ["failed", "ok"]
    assert "é" not in trajectory.text
    text = "".join(s.text for s in trajectory.spans if s.path == (1, 1))
    assert written(events, (1, 1)) == text


def test_a_repeated_continuation_keeps_what_came_before_it():
    failed: list[int] = []

    def script(request: apr.Request, prompt: str) -> apr.Reply | str:
        if prompt.endswith("<Thread>\n1:"):
            if request.resumed_tokens and len(failed) < 2:
                failed.append(request.resumed_tokens)
                return apr.Reply(f"  {'é' * 200}", error=apr.EngineError("busy", 503))
            return apr.Reply(f"  {'é' * 200}\n</Thread>")
        if prompt.endswith("<Thread>\n2:"):
            return branch(5)
        return AFTER if prompt.endswith("</Thread>\n") else outlines(2)

    engine = Server(script, apr.ByteTokenizer(DIALECT.tags))
    trajectory, events = reason(engine, budget=apr.Budget(tokens=900))
    assert outcomes(trajectory) == ["ok", "ok"]
    assert failed[0] % 2, "the lease cuts a character of two bytes, after two spaces"
    assert trajectory.blocks[0].branches[0].text.strip() == "é" * 200
    assert written(events, (1, 1)) == "".join(s.text for s in trajectory.spans if s.path == (1, 1))
    (call,) = (c for c in trajectory.calls if c.path == (1, 1))
    assert (call.retries, call.continuations, call.output_tokens) == (2, 1, 404)


async def sampled(engine: apr.ScriptedEngine, events: list[apr.Event], **options) -> apr.Trajectory:
    """Three completions, and one after them."""
    async with method_session(engine, "Q", "test", on_event=events.append, **options) as session:
        await session.fork(session.root, [Prompt(f"{k}:") for k in range(3)], share=0.7)
        await session.continue_from(session.root, "judge:")
        return session.finish()


def completions(error: Exception | None = None) -> Server:
    def script(request: apr.Request, prompt: str) -> apr.Reply | str:
        if prompt.endswith("0:"):
            return apr.Reply("a" * 300, error=error if request.resumed_tokens else None)
        return "short"

    return Server(script)


def test_a_method_with_a_limit_of_calls_keeps_those_that_it_has_planned():
    for calls in (None, 5):
        engine = completions()
        budget = apr.Budget(tokens=600, calls=calls)
        trajectory = virtual_time.run(sampled(engine, [], budget=budget))[0]
        assert trajectory.text.endswith("judge:short")
        assert any(call.continuations for call in trajectory.calls) == (calls is None)
        assert not [hit for hit in trajectory.limits if hit.limit == "calls"]


@pytest.mark.parametrize("limit", ["tokens", "critical_tokens"])
def test_the_prompts_of_a_method_exceed_no_limit(limit: str):
    async def work(room: int) -> apr.Trajectory:
        engine = apr.ScriptedEngine(lambda request, prompt: "a" * 90)
        async with method_session(engine, "Q", "test", budget=apr.Budget(**{limit: room})) as session:
            await session.samples([Prompt("first:"), Prompt("second:")], 2)
            await session.continue_from(session.root, "and then:")
            return session.finish()

    for room in range(1, 30):
        trajectory, _ = virtual_time.run(work(room))
        metrics = trajectory.metrics()
        assert {"tokens": metrics.total, "critical_tokens": metrics.critical_path}[limit] <= room
        assert {hit.limit for hit in trajectory.limits} == {limit}
        assert apr.Trajectory.from_json(trajectory.to_json()) == trajectory


def test_a_failed_continuation_of_a_method_voids_its_text():
    events: list[apr.Event] = []
    work = sampled(completions(apr.EngineError("gone", 400)), events, budget=apr.Budget(tokens=600))
    trajectory = virtual_time.run(work)[0]
    assert apr.rebuild(events) == trajectory
    text = "".join(s.text for s in trajectory.spans if s.path == (1, 1))
    assert text == written(events, (1, 1)) == "0:"


def test_a_branch_whose_own_branches_were_cut_while_they_waited_waits_for_its_slot():
    def goal(*numbers: str) -> str:
        lines = "".join(f"<Outline>\n{number}: t</Outline>\n" for number in numbers)
        return f"<Parallel>\n<Goal>\n{lines}</Goal>"

    def script(request: apr.Request, prompt: str) -> apr.Reply | str:
        if prompt.endswith("<Path>\n1:"):
            return apr.Reply(goal("1.1", "1.2"), delay=0.01)
        if prompt.endswith(("<Path>\n1.1:", "<Path>\n1.2:")):
            return apr.Reply("a" * 900, delay=0.01)
        if prompt.endswith("<Path>\n2:"):
            return apr.Reply("b" * 900, delay=0.3)
        return apr.Reply(goal("1", "2") if prompt == "Q\n" else "<Conclusion>\nc</Conclusion>", delay=0.05)

    tokenizer = apr.ByteTokenizer(apr.dialect("multiverse").tags)
    engine = Server(script, tokenizer)
    budget = apr.Budget(tokens=1500, seconds=60, depth=2)
    trajectory, _ = reason(
        engine, dialect="multiverse", budget=budget, pacing=apr.Pacing(max_parallel=1), policy="all"
    )
    assert any(len(hit.path) == 4 and hit.limit == "seconds" for hit in trajectory.limits)
    assert engine.max_running == 1


def test_a_branch_that_is_cut_at_the_moment_of_a_new_lease_breaks_nothing():
    async def work() -> int:
        leases = PendingLeases(0, results=False, final_tokens=lambda branch, lease: 0)
        leases.add("branch", Lease(10, 1 << 30, started=True))  # type: ignore[arg-type]
        waiting = asyncio.create_task(leases.extend("branch", 0))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        waiting.cancel()
        assert leases.lease_again(100)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return 1

    assert virtual_time.run(work())[0]


def test_a_branch_that_restarts_keeps_the_leases_that_it_got():
    recorder = TrajectoryRecorder(apr.ByteTokenizer(), None)
    sequence = recorder.start_trunk((1,), Allowance(100, 200, 1, 5), CancelScope())
    checkpoint = sequence.checkpoint()
    sequence.extend(30)
    sequence.extend(0, critical_path=40)
    sequence.allowance.spend(120, calls=2)
    sequence.restart(checkpoint)
    assert sequence.allowance == Allowance(130, 240, 1, 3)


def test_what_a_continuation_computes_again_is_no_longer_cached():
    one = apr.Result((1, 2, 3), "length", 50, 40, (0.0,) * 3)
    both = one.continued_by(apr.Result((4,), "stop", 53, 52, (0.0,)))
    assert (both.prompt_tokens, both.cached_tokens, both.token_ids) == (50, 40, (1, 2, 3, 4))
    assert len(both.logprobs or ()) == 4
    assert one.continued_by(apr.Result((4,), "stop", 53, 22)).cached_tokens == 10
    assert one.continued_by(apr.Result((4,), "stop", 53, None)).cached_tokens is None


def test_each_continuation_costs_a_request():
    trajectory, _ = reason(forked([branch(400), branch(5)]), budget=apr.Budget(tokens=900))
    (continued,) = (c for c in trajectory.calls if c.continuations)
    cost = EngineCost(request_s=1.0, prefill_s=0.0, steps=((1, 0.0), (2, 0.0)))
    requests = 1 + 1 + (1 + continued.continuations) + 1  # trunk, commit, the longest branch, after
    # The prompts of both branches share the engine until the shorter one has begun.
    assert predict_speedup(trajectory, cost).parallel_s == pytest.approx(requests + 1)


class Nested:
    """A branch that has forked, as the source of the pool of its branches."""

    def __init__(self, pool: LeasePool, lease) -> None:
        self.pool, self.lease, self.asked = pool, lease, 0

    def ask(self, grant) -> None:
        self.asked += 1
        self.pool.ask(self.lease, lambda tokens: grant(tokens * 3 // 4))

    def withdraw(self) -> None:
        self.pool.withdraw(self.lease)


def test_a_nested_pool_that_asks_again_at_once_gets_nothing_twice():
    pool = LeasePool(240, 0, results=False)
    first, second = pool.open([0, 0], 100, [1 << 30] * 2)
    nested = LeasePool(200, 0, results=False, source=Nested(pool, first))
    inner = nested.open([0, 0], 100, [1 << 30] * 2)
    pool.ask(second, lambda tokens: None)
    for lease in inner:
        nested.ask(lease, lambda tokens: None)
    assert pool.uncommitted >= 0
    assert first.tokens + second.tokens <= 240


def test_a_branch_that_gets_no_more_tokens_leaves_its_path_to_others():
    pool = LeasePool(400, 0, results=True, path_capacity=300)
    first, second = pool.open([0, 0], 100, [1 << 30] * 2)
    first_granted: list[int] = []

    def end(tokens: int) -> None:
        assert tokens == 0
        pool.end(second, 100, path_tokens=100, path_result_tokens=0)

    pool.ask_for_path(first, first_granted.append, 100)
    pool.capacity = 0  # nothing is left to lease
    pool.ask(second, end, 0)
    assert first_granted == [0]
    assert first.path_tokens == 150


def test_branches_that_wait_for_a_longer_path_take_no_tokens_from_the_outer_fork():
    outer = LeasePool(1000, 0, results=True)
    (lease,) = outer.open([0], 100, [1 << 30])
    source = Nested(outer, lease)
    pool = LeasePool(400, 0, results=True, source=source, path_capacity=60)
    inner = pool.open([0, 0], 100, [1 << 30] * 2)
    granted: list[int] = []
    for one in inner:
        pool.ask_for_path(one, granted.append, 20)
    assert granted == [0, 0]
    assert not source.asked


class JoiningEngine(SeededEngine):
    """Checks the layout of every request, as the server does."""

    joins_kv = True
    layouts = 0

    def check(self, request: apr.Request) -> None:
        if request.layout is not None:
            parse_layout(json.dumps(request.layout), len(request.input_ids))
            self.layouts += bool(request.resumed_tokens)

    async def decode(self, request: apr.Request, on_tokens=None) -> apr.Result:
        self.check(request)
        return await super().decode(request, on_tokens)

    async def commit(self, request: apr.Request) -> apr.Result:
        self.check(request)
        return await super().commit(request)


def test_the_layout_of_a_joined_prompt_covers_what_is_continued():
    continued = 0
    for seed in range(6):
        engine = JoiningEngine(masked("multiverse"), random.Random(seed))
        budget = apr.Budget(tokens=1500, width=3, depth=2, blocks=6, outline_chars=8)
        work = apr.areason(engine, "Q: ", "multiverse", budget=budget, seed=seed, join="kv", mode="parallel")
        trajectory, _ = virtual_time.run(work)
        apr.dialect("multiverse").validate(trajectory.text)
        assert all(join.by == "kv" for join in trajectory.joins)
        continued += engine.layouts
    assert continued
