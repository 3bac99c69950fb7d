"""Thoughts: what is asked at once shares a committed prefix and one budget, and the trajectory says what followed what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.requests import common_prefix
from sgl_apr.methods.session import MethodSession, method_session

ENGINE = apr.ScriptedEngine


def run(script: Callable[..., Any], program: Callable[[MethodSession], Any], **options: Any):
    """What a program returns, its trajectory, and the engine."""
    engine = ENGINE(script)

    async def once():
        async with method_session(engine, "Q: ", "test", seed=0, **options) as thoughts:
            found = await program(thoughts)
            return found, thoughts.finish(), engine

    return asyncio.run(once())


def test_forks_share_a_committed_prefix():
    async def program(t: MethodSession):
        begun = await t.continue_from(t.root, "first ")
        return await t.fork(begun, ["a", "b", Prompt("c", tokens=3)])

    found, trajectory, engine = run(lambda request, prompt: f"<{prompt[-1]}>xyz", program)
    assert [t.text for t in found] == ["<a>xyz", "<b>xyz", "<c>"]
    assert [t.finish for t in found] == ["eos", "eos", "length"]
    assert engine.commits == [tuple(b"Q: first < >xyz")]
    assert [bytes(r.input_ids) for r in engine.requests[1:]] == [
        b"Q: first < >xyz" + c for c in (b"a", b"b", b"c")
    ]
    assert [b.text for b in trajectory.blocks[0].branches] == ["<a>xyz", "<b>xyz", "<c>"]
    metrics = trajectory.metrics()
    assert metrics.total == len("first < >xyz") + 7 + 7 + 4
    assert metrics.critical_path == len("first < >xyz") + 7
    assert metrics.reprefilled_tokens <= len(trajectory.calls)
    assert engine.released == 3
    assert trajectory.limits == (), "three tokens were asked for, and three granted"
    assert apr.Trajectory.from_json(trajectory.to_json()) == trajectory


def test_a_tree_stands_in_the_order_of_its_forks():
    async def program(t: MethodSession):
        one, two = await t.fork(t.root, ["1", "2"])
        await t.fork(two, ["3", "4"])
        await t.fork(one, ["5"])
        await t.continue_from(t.root, "end")

    _, trajectory, _ = run(lambda request, prompt: "", program)
    paths = list(dict.fromkeys(s.path for s in trajectory.spans))
    assert paths == [(), (1, 1), (1, 1, 1, 1), (1, 2), (1, 2, 1, 1), (1, 2, 1, 2)]
    prompts = [trajectory.spans[i].text for i in trajectory.ancestors(len(trajectory.spans) - 1)]
    assert "".join(prompts) == "Q: end"
    deepest = next(i for i, s in enumerate(trajectory.spans) if s.path == (1, 2, 1, 2) and s.text == "4")
    assert "".join(trajectory.spans[i].text for i in trajectory.ancestors(deepest)) == "Q: 24"


def test_thoughts_apart_see_nothing_else_but_come_later():
    async def program(t: MethodSession):
        found = await t.fork(t.root, ["long", "s"])
        return await t.sample_independent([Prompt(f"same: {k}", depends_on=tuple(found)) for k in (1, 2)])

    found, trajectory, engine = run(lambda request, prompt: "ok", program)
    assert [t.text for t in found] == ["ok", "ok"]
    assert [bytes(ids) for ids in engine.commits] == [b"Q: ", b"same: "]
    assert trajectory.metrics().critical_path == len("longok") + len("same: 1ok")
    last = len(trajectory.spans) - 1
    assert "".join(trajectory.spans[i].text for i in trajectory.ancestors(last)) == "same: 2ok"


def test_what_is_shown_is_a_parent_and_is_not_counted_again():
    async def program(t: MethodSession):
        first = await t.fork(t.root, ["", ""])
        return await t.sample_with_context([("Q: seen", first, Prompt()), ("Q: seen", first[:1], Prompt())])

    _, trajectory, engine = run(lambda request, prompt: "abc", program)
    assert bytes(engine.requests[-1].input_ids) == b"Q: seen"
    metrics = trajectory.metrics()
    assert (metrics.total, metrics.critical_path) == (12, 6)
    assert len(trajectory.ancestors(len(trajectory.spans) - 1)) == 3


@pytest.mark.parametrize("tokens", [1, 5, 20, 61])
def test_a_budget_is_never_exceeded(tokens: int):
    async def program(t: MethodSession):
        found = await t.fork(t.root, ["ab"] * 3, share=0.5)
        await asyncio.gather(t.fork(found[0], ["cd"] * 2), t.continue_from(t.root, "ef"))

    _, trajectory, engine = run(lambda request, prompt: "x" * 50, program, budget=apr.Budget(tokens=tokens))
    assert trajectory.metrics().total <= tokens
    assert {x.limit for x in trajectory.limits} == {"tokens"}
    assert not engine.active


def test_other_limits():
    async def program(t: MethodSession):
        assert t.affordable_width(9) == 2
        assert t.affordable_width(9, tokens=30, share=0.5) == 1
        for _ in range(3):
            await t.fork(t.root, ["a", "b"])

    budget = apr.Budget(tokens=59, width=2, calls=7, branch_tokens=4)
    _, trajectory, _ = run(lambda request, prompt: "x" * 50, program, budget=budget)
    assert trajectory.metrics().engine_calls == 7
    assert {x.limit for x in trajectory.limits} == {"width", "tokens", "calls", "branch_tokens"}
    assert max(len(s.token_ids or ()) for s in trajectory.spans if s.origin == "decoded") == 4


def test_the_critical_path_is_limited():
    async def program(t: MethodSession):
        found = await t.fork(t.root, ["a", "b"])
        await t.fork(found[0], ["c", "d"])

    budget = apr.Budget(critical_tokens=15)
    _, trajectory, _ = run(lambda request, prompt: "x" * 9, program, budget=budget)
    assert trajectory.metrics().critical_path == 15


def test_the_first_to_end_stops_the_others_and_time_stops_all():
    def script(request: apr.Request, prompt: str):
        return apr.Reply("x" * (2 if prompt.endswith("a") else 1000), delay=0.01)

    async def program(t: MethodSession):
        return await t.fork(t.root, ["a", "b"], policy="first")

    found, trajectory, _ = run(script, program)
    assert [t.finish for t in found] == ["eos", "aborted"]
    assert [b.outcome for b in trajectory.blocks[0].branches] == ["eos", "aborted"]

    async def late(t: MethodSession):
        return await t.fork(t.root, ["b", "b"])

    found, trajectory, _ = run(script, late, budget=apr.Budget(seconds=0.2))
    assert [t.finish for t in found] == ["timeout", "timeout"]
    assert {x.limit for x in trajectory.limits} == {"seconds"}
    assert trajectory.wall_s < 2


@pytest.mark.parametrize("failed", ["skip", "raise"])
def test_a_failure_stays_with_its_thought(failed: str):
    def script(request: apr.Request, prompt: str):
        return apr.Reply("half", error=apr.EngineError("broken", 400)) if prompt.endswith("b") else "whole"

    async def program(t: MethodSession):
        return await t.fork(t.root, ["a", "b", "c"])

    if failed == "raise":
        with pytest.raises(apr.EngineError, match="broken"):
            run(script, program, on_branch_failure=failed)
        return
    found, trajectory, _ = run(script, program)
    assert [(t.text, t.finish) for t in found] == [("whole", "eos"), ("", "failed"), ("whole", "eos")]
    assert trajectory.blocks[0].branches[1].outcome == "failed"


def test_cancelling_aborts_everything():
    engine = ENGINE(lambda request, prompt: apr.Reply("x" * 1000, delay=0.01))

    async def once():
        async with method_session(engine, "Q: ", "test") as t:
            await t.fork(t.root, ["a", "b"])

    async def cancelled():
        task = asyncio.create_task(once())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert not engine.active
    assert len(engine.aborted) == 1
    assert engine.released == 2


def test_its_events_tell_all_of_it():
    events: list[apr.Event] = []

    async def program(t: MethodSession):
        found = await t.fork(t.root, [Prompt("1", name="one"), "2"])
        await t.sample_independent([Prompt("3", depends_on=tuple(found))])

    _, trajectory, _ = run(lambda request, prompt: "some text", program, on_event=events.append)
    assert apr.rebuild(events) == trajectory
    heard = [e for e in events if isinstance(e, apr.Forked)]
    assert heard == [apr.Forked((1,), (("1", "one"), ("2", ""))), apr.Forked((2,), (("1", ""),))]
    for branch in trajectory.blocks[0].branches:
        assert "".join(e.text for e in events if isinstance(e, apr.Delta) and e.path == branch.path) == (
            f"{branch.number}some text"
        )


def test_a_prompt_that_the_context_does_not_hold():
    engine = ENGINE(lambda request, prompt: "")
    engine.context = 3

    async def once():
        async with method_session(engine, "Q: ", "test"):
            pass

    with pytest.raises(apr.BudgetExceeded, match="the prompt has 3 tokens"):
        asyncio.run(once())


def test_common():
    assert common_prefix([(1, 2)]) == (1, 2)
    assert common_prefix([(1,), (2,)]) == ()


def test_a_method_is_bounded_by_its_budget_and_by_no_dialect():
    async def program(t: MethodSession):
        return await t.fork(t.root, [f"{k}" for k in range(60)])

    found, trajectory, _ = run(lambda request, prompt: "ok", program, budget=apr.Budget(width=64, depth=9))
    assert [t.text for t in found] == ["ok"] * 60
    assert trajectory.limits == ()


def test_the_width_of_a_budget_bounds_how_many_run_at_once():
    running, peak = 0, 0

    class Counting(apr.ScriptedEngine):
        async def decode(self, request, on_tokens=None):
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            try:
                return await super().decode(request, on_tokens)
            finally:
                running -= 1

    async def once(budget: object):
        async with method_session(Counting(lambda request, prompt: "ok"), "Q: ", "test", budget=budget) as t:
            return await t.fork(t.root, ["a", "b", "c", "d"])

    assert len(asyncio.run(once({"width": 2}))) == 4
    assert peak == 2
    asyncio.run(once(None))
    assert peak == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "parallel"}, "no option 'mode': a method has a fixed structure"),
        ({"policy": "first"}, "no option 'policy': a method has a fixed structure"),
        ({"temprature": 1}, "no option 'temprature', did you mean 'temperature'?"),
        ({"temperature": -1}, "temperature=-1, expected a number"),
        ({"budget": 3}, "budget=3, expected an object with fields of Budget"),
        ({"budget": {"widht": 3}}, "no budget 'widht', did you mean 'width'?"),
        ({"stop": ["x"]}, "no option 'stop'"),
        ({"on_event": 3}, "on_event=3, expected a function"),
    ],
)
def test_a_wrong_option_of_a_method_is_refused(options: dict, message: str):
    async def program(t: MethodSession):
        raise AssertionError("it has begun")

    with pytest.raises(apr.AprError) as raised:
        run(lambda request, prompt: "", program, **options)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("self_consistency", {"n": "many"}, "n='many', expected a whole number"),
        ("self_consistency", {"temperature": -1}, "temperature=-1, expected a number from 0"),
        ("self_consistency", {"mode": "parallel"}, "a method has a fixed structure"),
        ("self_consistency", {"seed": "x"}, "seed='x', expected a whole number"),
        ("hogwild", {"worker": 3}, "no option 'worker', did you mean 'workers'?"),
        ("threadweaver", {"mode": "par"}, "mode='par', expected"),
        ("selfconsistency", {}, "no method 'selfconsistency', did you mean 'self_consistency'?"),
    ],
)
def test_solve_checks_its_arguments_where_it_is_built(method: str, options: dict, message: str):
    with pytest.raises(apr.AprError) as raised:
        apr.solve("answer", "Why?", method=method, task=lambda engine: None, **options)
    assert message in str(raised.value)
    with pytest.raises(apr.AprError, match="task='x', expected a subclass of Task"):
        apr.solve("answer", "Why?", method="sequential", task="x")


def test_every_option_of_a_method_is_known_to_solve():
    task = lambda engine: None  # noqa: E731
    apr.solve("a", "Why?", method="self_consistency", task=task, n=3, temperature=0.5, budget={"tokens": 9})
    apr.solve("a", "Why?", method="hogwild", task=task, workers=3, chunk=8, seed=1, retry={"attempts": 1})


def test_chat_messages_begin_a_session():
    class Chat(apr.ByteTokenizer):
        def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
            return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    engine = apr.ScriptedEngine(lambda request, prompt: "So.", Chat())

    async def once():
        async with method_session(engine, [{"role": "user", "content": "Why?"}], "test") as t:
            await t.continue_from(t.root)
            return t.finish()

    assert asyncio.run(once()).text.startswith("So.")
    assert bytes(engine.requests[0].input_ids) == b"<user>Why?<assistant>"


def test_nothing_is_decoded_after_an_empty_prompt():
    engine = apr.ScriptedEngine(lambda request, prompt: "So.")

    async def once():
        async with method_session(engine, "", "test") as t:
            await t.continue_from(t.root)

    with pytest.raises(apr.AprError, match="the prompt of a request is empty"):
        asyncio.run(once())
    assert not engine.requests


@pytest.mark.parametrize("forked", [False, True])
def test_what_the_engine_cuts_by_a_limit_of_its_own_is_not_continued(forked: bool):
    """SGLang takes a few tokens less than its context has."""

    async def program(t: MethodSession):
        real = t.requests.engine.decode

        async def cut_short(request, on_tokens=None):
            assert not request.resumed_tokens
            return await real(replace(request, max_tokens=min(20, request.max_tokens)), on_tokens)

        t.requests.engine.decode = cut_short
        if forked:
            return (await t.fork(t.root, ["a", "b"]))[0]
        return await t.continue_from(t.root, "a")

    budget = apr.Budget(tokens=300)
    completion, trajectory, _ = run(lambda request, prompt: "x" * 200, program, budget=budget)
    assert completion.text == "x" * 20
    assert completion.finish == "length"
    assert {hit.limit for hit in trajectory.limits} == {"context"}
