"""When branches join, how many run at once, and by which seeds: on a script, in virtual time."""

from __future__ import annotations

import re

import pytest

import sgl_apr as apr
from sgl_apr.runtime.seeds import derive_seed
from tests.support import virtual_time
from tests.support.threadweaver_traces import TAGS

WIDTH = 4
OUTLINES = "".join(f"<Outline>{k}: way {k}</Outline>\n" for k in range(1, WIDTH + 1))
FORK = f"<Parallel>\n<Outlines>\n{OUTLINES}</Outlines>"


class Script:
    """Branch k writes k * 10 letters, one in each second; or fails, if it is one of `failing`."""

    def __init__(self, *failing: int) -> None:
        self.failing = failing
        self.engine = apr.ScriptedEngine(self, apr.ByteTokenizer(TAGS))
        self.most = 0

    def __call__(self, request: apr.Request, prompt: str) -> apr.Reply:
        self.most = max(self.most, len(self.engine.active) + 1)
        if found := re.search(r"<Thread>\n(\d):$", prompt):
            k = int(found[1])
            error = apr.EngineError("boom", 400) if k in self.failing else None
            return apr.Reply("x" * 10 * k + "</Thread>", delay=1.0, error=error)
        return apr.Reply(FORK if "<Parallel>" not in prompt else "</Parallel>Done.", delay=0.0)

    def run(self, **options) -> tuple[apr.Trajectory, float]:
        trajectory, seconds = virtual_time.run(apr.areason(self.engine, "Q: ", "threadweaver", **options))
        apr.dialect("threadweaver").validate(trajectory.text)
        assert trajectory.answer == "Done."
        assert not self.engine.active
        return trajectory, seconds


def outcomes(trajectory: apr.Trajectory) -> list[str | None]:
    return [b.outcome for b in trajectory.blocks[0].branches]


def two_long(ended) -> bool:
    return sum(len(branch.text) >= 20 for branch in ended) >= 2


@pytest.mark.parametrize(
    ("policy", "expected", "seconds"),
    [
        ("all", ["ok"] * 4, 41),
        ("first", ["ok", "aborted", "aborted", "aborted"], 11),
        ("quorum:2", ["ok", "ok", "aborted", "aborted"], 21),
        ("quorum:9", ["ok"] * 4, 41),
        ("deadline:25.5", ["ok", "ok", "timeout", "timeout"], 25.5),
        (two_long, ["ok", "ok", "ok", "aborted"], 31),
        (lambda ended: False, ["ok"] * 4, 41),
    ],
)
def test_a_policy_says_when_to_join(policy, expected, seconds):
    trajectory, took = Script().run(policy=policy)
    assert outcomes(trajectory) == expected
    assert took == pytest.approx(seconds, abs=0.01)
    cut = [b for b in trajectory.blocks[0].branches if b.outcome != "ok"]
    assert trajectory.limits == tuple(apr.LimitHit("policy", b.path) for b in cut)
    for branch in cut:
        assert branch.text == "x" * int(seconds), "what it had written is kept"
        assert trajectory.spans[branch.spans[-1]].origin == "injected", "and closed"


def test_a_failure_is_not_the_first():
    trajectory, took = Script(1).run(policy="first")
    assert outcomes(trajectory) == ["failed", "ok", "aborted", "aborted"]
    assert took == pytest.approx(21, abs=0.01)


def test_where_too_few_are_left_for_a_quorum_all_are_waited_for():
    trajectory, _ = Script(1, 2).run(policy="quorum:3")
    assert outcomes(trajectory) == ["failed", "failed", "ok", "ok"]


def test_the_budget_of_time_is_earlier_than_a_later_deadline():
    trajectory, _ = Script().run(policy="deadline:1000", budget=apr.Budget(seconds=20.0))
    assert outcomes(trajectory) == ["ok", "timeout", "timeout", "timeout"]
    assert {limit.limit for limit in trajectory.limits} == {"seconds"}


def test_a_policy_function_receives_no_failed_branches():
    received: list[tuple[tuple[int, ...], str | None]] = []

    def first_of_those_that_work(ended) -> bool:
        received.extend((branch.path, branch.finish) for branch in ended)
        return bool(ended)

    trajectory, took = Script(1).run(policy=first_of_those_that_work)
    assert received == [((1, 2), "stop")]
    assert outcomes(trajectory) == ["failed", "ok", "aborted", "aborted"]
    assert took == pytest.approx(21, abs=1.5)


@pytest.mark.parametrize("policy", ["some", "quorum:0", "quorum:", "deadline:", "deadline:-1", 3])
def test_no_such_policy(policy):
    with pytest.raises(
        apr.AprError, match='expected "all", "first", "quorum:k", "deadline:s", or a function'
    ):
        Script().run(policy=policy)


def test_an_asynchronous_dialect_joins_when_the_model_says_so():
    engine = apr.ScriptedEngine(lambda request, prompt: "x", apr.ByteTokenizer())
    with pytest.raises(apr.AprError, match="joins when the model says so"):
        virtual_time.run(apr.areason(engine, "Q: ", "asyncthink", policy="first"))


# Pacing

STEPS = ((1.0, 0.010), (2.0, 0.011), (4.0, 0.013), (8.0, 0.060))


def load(running: int = 0, free: int = 1 << 20, steps=STEPS) -> apr.Load:
    return apr.Load(running=running, waiting=0, used_tokens=0, max_tokens=free, steps=steps)


@pytest.mark.parametrize(
    ("pacing", "demand", "known", "at_once", "why"),
    [
        (apr.Pacing(), (4, 100), load(), 4, "all at once"),
        (apr.Pacing(), (8, 100), load(), 4, "4 at a time end 2.31x sooner"),
        (apr.Pacing(min_speedup=3.0), (8, 100), load(), 8, "all at once"),
        (apr.Pacing(), (8, 100), load(steps=()), 8, "all at once"),
        (apr.Pacing(), (8, 100), load(steps=((1.0, 0.01),)), 8, "all at once"),
        (apr.Pacing(), (8, 1000), load(steps=(), free=1000), 3, "1000 KV tokens are free"),
        (apr.Pacing(), (8, 1000), load(steps=(), free=0), 1, "0 KV tokens are free"),
        (apr.Pacing(expected_fill=1.0), (8, 1000), load(steps=(), free=2500), 2, "2500 KV tokens are free"),
        (apr.Pacing(max_parallel=3), (8, 1), load(steps=()), 3, "at most 3"),
    ],
)
def test_the_default_pace(pacing, demand, known, at_once, why):
    assert pacing(apr.Demand(*demand), known) == (at_once, why)


def test_it_is_never_slower_than_all_at_once_by_what_was_measured():
    for running in range(12):
        for n in range(1, 16):
            known = load(running)
            k, _ = apr.Pacing()(apr.Demand(n, 1), known)
            rounds = -(-n // k)
            assert rounds * known.step_s(running + k) <= known.step_s(running + n) + 1e-12


def test_branches_run_as_paced_and_the_decision_is_kept():
    script = Script()
    script.engine.loads = load(running=7, free=10_000)
    trajectory, took = script.run(pacing=lambda demand, load: (2, f"{demand.branches} on {load.running}"))
    assert script.most == 2
    assert took == pytest.approx(62, abs=0.01), "4 begins when 2 has ended, after 21 s"
    (decision,) = trajectory.decisions
    assert (decision.path, decision.branches, decision.parallelism) == ((1,), 4, 2)
    assert (decision.running, decision.free_tokens, decision.reason) == (7, 10_000, "4 on 7")
    assert decision.step_s == load().step_s(9)


def test_a_branch_that_still_waits_is_cut_too():
    trajectory, took = Script().run(pacing=apr.Pacing(max_parallel=1), policy="first")
    assert outcomes(trajectory) == ["ok", "aborted", "aborted", "aborted"]
    assert [b.text for b in trajectory.blocks[0].branches][1:] == ["..."] * 3
    assert took == pytest.approx(11, abs=0.01)


def test_a_fork_may_be_narrowed_before_it_is_written():
    script = Script()
    script.engine.loads = load(steps=(), free=0)
    trajectory, _ = script.run(cap_width_by_load=True, budget=apr.Budget(width=8), mode="parallel")
    trunk = script.engine.requests[0].grammar
    assert "outline_2" in trunk
    assert "outline_3" not in trunk, "the mask has two branches at the most, the fewest of the dialect"
    assert trajectory.decisions[0].reason == "capped: 0 KV tokens are free"
    with pytest.raises(apr.AprError, match="cap_width_by_load=True"):
        script.run(cap_width_by_load=True, pacing=None)


def test_an_engine_that_does_not_say_how_busy_it_is_runs_all():
    script = Script()

    async def load() -> apr.Load:
        raise apr.EngineError("not found", 404)

    script.engine.load = load
    trajectory, took = script.run()
    assert trajectory.decisions == ()
    assert took == pytest.approx(41, abs=0.01)


# Seeds


def test_every_request_has_a_seed_of_its_own_that_can_be_derived_again():
    for policy in ("all", "first"):
        script = Script()
        trajectory, _ = script.run(seed=7, policy=policy)
        sent = [r.sampling["sampling_seed"] for r in script.engine.requests]
        noted = {c.path: c.seed for c in trajectory.calls if c.phase == "branch"}
        assert len(set(sent)) == len(sent)
        assert noted == {(1, k): derive_seed(7, (1, k), 0) for k in range(1, 5)}
        assert (trajectory.seed, trajectory.seeds_honoured) == (7, True)


def test_a_request_is_repeated_with_its_seed():
    script = Script()
    replies = iter([apr.Reply("x", error=apr.EngineError("boom", 503)), FORK])
    script.engine.script = lambda request, prompt: (
        next(replies) if prompt == "Q: " else script(request, prompt)
    )
    script.run(seed=7, retry=apr.Retry(wait=0))
    first, second = (r.sampling["sampling_seed"] for r in script.engine.requests[:2])
    assert first == second


def test_an_engine_that_honours_no_seeds_is_sent_none():
    script = Script()
    script.engine.supports_seeds = False
    trajectory, _ = script.run()
    assert not any("sampling_seed" in r.sampling for r in script.engine.requests)
    assert (trajectory.seeds_honoured, trajectory.seed is None) == (False, False)
