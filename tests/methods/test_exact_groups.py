"""Group Think and Hogwild! on an engine that decodes groups: what is sent, who is cut, budgets, failures and records."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import MethodResult, check_arguments, method
from sgl_apr.methods.task import CollaborativeTask, Task
from sgl_apr.trajectory.worker_groups import GroupKind
from sgl_apr.views.page_entry import full_entry
from sgl_apr.views.tree import render_tree

KINDS: tuple[GroupKind, ...] = ("group_think", "hogwild")
LABELS = {"group_think": "groupthink-exact", "hogwild": "hogwild-exact"}


class Talk(CollaborativeTask[str]):
    """All share the problem, and worker k opens with `k:`. An answer follows "="."""

    name, max_tokens, step_separator = "talk", 20, "|"

    def shared_context_prompt(
        self, problem: str, own: str, others: Sequence[str], past: str = ""
    ) -> tuple[str, Prompt]:
        return f"{problem}{past}{own}", Prompt()

    def worker_prompts(self, problem: str, workers: int, kind: GroupKind) -> tuple[str, Sequence[Prompt]]:
        return problem, [Prompt(f"{k}:", name=f"w{k}") for k in range(1, workers + 1)]

    def answer(self, text: str) -> str:
        return text.partition("=")[2].partition("|")[0]


def speaker(*replies: apr.Reply | str) -> Any:
    """Worker k gets the k-th reply."""
    return lambda request, prompt: replies[int(prompt[-2]) - 1]


def run(
    name: str,
    *replies: apr.Reply | str,
    engine: apr.ScriptedEngine | None = None,
    task: type[Task[str]] = Talk,
    **options: Any,
) -> tuple[MethodResult, apr.ScriptedEngine]:
    engine = engine or apr.ScriptedEngine(speaker(*replies), groups=KINDS)
    count = {"group_think": "thinkers", "hogwild": "workers"}[name]
    options = {count: len(replies), "chunk": 1, "seed": 0, **options}
    result = asyncio.run(method(name)(engine, "Question ", task=task(engine), **options))
    assert not engine.active
    return result, engine


def finishes(result: MethodResult) -> list[str | None]:
    return [branch.finish for block in result.trajectory.blocks for branch in block.branches]


def texts(result: MethodResult) -> list[str]:
    return [branch.text for block in result.trajectory.blocks for branch in block.branches]


@pytest.mark.parametrize("name", KINDS)
def test_one_group_after_a_committed_prompt(name: str):
    result, engine = run(name, "a=1", "bb=2", "ccc=1", enough=3)
    (group,) = engine.group_requests
    assert engine.commits == [tuple(b"Question ")]
    assert (group.kind, group.prompt_tokens) == (name, len("Question "))
    assert [bytes(r.input_ids) for r in group.requests] == [b"Question 1:", b"Question 2:", b"Question 3:"]
    assert group.step_end == ("|" if name == "hogwild" else None)
    assert (result.answer, result.label) == ("1", LABELS[name])
    assert texts(result) == ["a=1", "bb=2", "ccc=1"]
    assert finishes(result) == ["eos"] * 3
    (record,) = result.trajectory.groups
    assert (record.path, record.kind, record.step_end) == ((1,), name, group.step_end or "")
    assert record.position_range == (group.position_range if name == "group_think" else 0)
    m = result.metrics
    assert m.total == sum(len(text) + 2 for text in texts(result))
    assert m.critical_path == 2 + len("ccc=1"), "workers decode in the same steps"
    assert m.acceleration == pytest.approx(1 - 7 / m.total)
    assert m.engine_calls == 1 + 3
    # The first tokens saw the prompt and three headers; the last one of worker 3 also all of the others, with their ends.
    seen = [
        own
        for own, span in zip(result.trajectory.tokens_seen, result.trajectory.spans, strict=True)
        if span.role == "body"
    ]
    assert [own[0] for own in seen] == [9 + 6] * 3
    assert seen[2][-1] == 15 + len("a=1") + 1 + len("bb=2") + 4, "an end of text is seen, too"


def test_a_quorum_of_answers_cuts_the_others():
    result, engine = run("group_think", "a=7", "bb=7", "c" * 90)
    rids = [request.rid for request in engine.group_requests[0].requests]
    assert engine.aborted == [rids[2]]
    assert (result.answer, result.score) == ("7", pytest.approx(2 / 3))
    assert finishes(result) == ["eos", "eos", "aborted"]
    assert apr.LimitHit("policy", (1, 3)) in result.trajectory.limits
    assert 4 <= len(texts(result)[2]) <= 7, "what it had written stays"


def test_a_finished_step_with_an_answer_ends_hogwild():
    result, engine = run("hogwild", "x|y=1|zzzzzzzzzzzzzz", "b" * 90)
    assert (result.answer, result.score) == ("1", 0.5)
    assert len(engine.aborted) == 2
    assert finishes(result) == ["aborted", "aborted"]
    assert texts(result)[0].startswith("x|y=1|")
    assert len(texts(result)[1]) < 20
    unfinished, _ = run("hogwild", "=12345", "b" * 3)
    assert unfinished.answer == "12345", "a worker that has ended needs no end of a step"


def test_answers_of_ended_agents_count_and_else_all():
    result, _ = run("group_think", "=1", apr.Reply("=5", error=apr.EngineError("broken", 400)), "x=1")
    assert (result.answer, result.score) == ("1", pytest.approx(2 / 3))
    cut, _ = run("group_think", "=12345678", "=12945678", budget=apr.Budget(tokens=10))
    assert cut.answer == "12", "at the limit all that there is counts"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tokens", [1, 4, 5, 7, 20])
def test_a_budget_is_kept(name: str, tokens: int):
    result, _ = run(name, "a" * 90, "b" * 90, budget=apr.Budget(tokens=tokens))
    assert result.metrics.total <= tokens
    assert {limit.limit for limit in result.trajectory.limits} == {"tokens"}


def test_other_limits():
    result, engine = run(
        "group_think", "a" * 90, "b" * 90, "c" * 90, budget=apr.Budget(branch_tokens=6, width=2)
    )
    assert [request.max_tokens for request in engine.group_requests[0].requests] == [6, 6]
    assert {limit.limit for limit in result.trajectory.limits} == {"width", "branch_tokens"}
    engine = apr.ScriptedEngine(speaker("a" * 90, "b" * 90), groups=KINDS)
    engine.context = 41
    result, _ = run("group_think", "a", "b", engine=engine)
    group = engine.group_requests[0]
    assert group.prompt_tokens + 2 * group.position_range == 41, "all workers stand in one context"
    assert {limit.limit for limit in result.trajectory.limits} == {"context"}
    result, _ = run("hogwild", "a" * 90, "b" * 90, budget=apr.Budget(critical_tokens=12))
    assert result.metrics.critical_path == 12
    result, engine = run("hogwild", "a" * 90, "b" * 90, budget=apr.Budget(calls=2))
    assert len(engine.group_requests[0].requests) == 1, "a commit and one worker"


@pytest.mark.parametrize("name", KINDS)
def test_at_the_deadline_what_was_written_counts(name: str):
    slow = apr.Reply("=1" + "a" * 90, delay=0.01)
    result, _ = run(name, slow, slow, budget=apr.Budget(seconds=0.15))
    assert finishes(result) == ["timeout"] * 2
    assert all(2 <= len(text) < 60 for text in texts(result))
    assert {limit.limit for limit in result.trajectory.limits} == {"seconds"}
    assert result.answer.startswith("1")


def test_a_failure_stays_with_its_worker():
    broken = apr.Reply("bbb", error=apr.EngineError("broken", 400))
    result, _ = run("group_think", "aaaaaa=1", broken, enough=2)
    assert (result.answer, finishes(result)) == ("1", ["eos", "failed"])
    assert texts(result)[1] == "bbb", "the others saw it, so it stays"
    with pytest.raises(apr.EngineError, match="broken"):
        run("group_think", "aaaaaa=1", broken, enough=2, on_branch_failure="raise")


@pytest.mark.parametrize("name", KINDS)
def test_a_group_that_the_engine_refuses_is_an_error(name: str):
    engine = apr.ScriptedEngine(speaker("a", "b"), groups=KINDS)

    async def refuse(*_: Any) -> Any:
        raise apr.EngineError("worker group: this model has no rotary embedding", 400)

    engine.group = refuse  # type: ignore[method-assign]
    with pytest.raises(apr.EngineError, match="no rotary embedding"):
        run(name, "", "", engine=engine)


@pytest.mark.parametrize("name", KINDS)
def test_a_group_that_failed_as_one_is_repeated(name: str):
    made_room = apr.EngineError("worker group: a worker had to make room for other requests", 503)
    failures = iter([made_room, made_room])

    def script(request: apr.Request, prompt: str) -> apr.Reply:
        return apr.Reply("x=4", error=next(failures, None))

    events: list[apr.Event] = []
    engine = apr.ScriptedEngine(script, groups=KINDS)
    result, _ = run(name, "", "", engine=engine, enough=2, retry={"wait": 0}, on_event=events.append)
    first, second = engine.group_requests
    assert not {r.rid for r in first.requests} & {r.rid for r in second.requests}
    assert (result.answer, finishes(result)) == ("4", ["eos", "eos"])
    assert result.metrics.engine_calls == 1 + 2 * 2
    assert [e for e in events if isinstance(e, apr.TextRetracted)] == [
        apr.TextRetracted((1, 1), 3), apr.TextRetracted((1, 2), 3),
    ]  # fmt: skip
    assert apr.rebuild(events) == result.trajectory
    always = apr.ScriptedEngine(lambda request, prompt: apr.Reply("x", error=made_room), groups=KINDS)
    failed, _ = run(name, "", "", engine=always, retry={"wait": 0})
    assert finishes(failed) == ["failed"] * 2
    with pytest.raises(apr.EngineError, match="make room"):
        run(name, "", "", engine=always, retry={"wait": 0}, on_branch_failure="raise")


@pytest.mark.parametrize("name", KINDS)
def test_events_come_token_by_token(name: str):
    events: list[apr.Event] = []
    result, _ = run(name, "ab=1", "cdef=1", enough=2, on_event=events.append)
    deltas = [(e.path, e.text) for e in events if isinstance(e, apr.Delta)]
    assert deltas[:6] == [
        ((1, 1), "1:"), ((1, 2), "2:"), ((1, 1), "a"), ((1, 2), "c"), ((1, 1), "b"), ((1, 2), "d"),
    ]  # fmt: skip
    ended = [e.path for e in events if isinstance(e, apr.BranchEnded)]
    assert ended == [(1, 1), (1, 2)]
    first_end = next(i for i, e in enumerate(events) if isinstance(e, apr.BranchEnded))
    assert any(isinstance(e, apr.Delta) for e in events[first_end:]), "the other one still writes"
    assert apr.rebuild(events) == result.trajectory
    assert apr.Trajectory.from_json(result.trajectory.to_json()) == result.trajectory


def test_it_is_shown():
    from rich.console import Console

    result, _ = run("hogwild", "ab=1", "cdef=1", enough=2)
    console = Console(width=100, record=True, file=None, quiet=True)
    with console.capture() as capture:
        console.quiet = False
        console.print(render_tree(result.trajectory, "Q"))
    shown = capture.get()
    assert "group of 2 workers (hogwild)" in shown
    assert "cdef=1" in shown
    assert full_entry(result.trajectory)["groups"] == [
        {"path": (1,), "kind": "hogwild", "position_range": 0, "step_end": "|"}
    ]


@pytest.mark.parametrize("name", KINDS)
def test_exact_is_a_choice(name: GroupKind):
    def engine(*kinds: GroupKind) -> apr.ScriptedEngine:
        return apr.ScriptedEngine(lambda request, prompt: "=1", groups=kinds)

    (other,) = set(KINDS) - {name}
    chunked = f"{LABELS[name].removesuffix('exact')}chunk(9)"
    for able, options in ((engine(), {}), (engine(*KINDS), {"exact": False}), (engine(other), {})):
        result, _ = run(name, "", "", engine=able, chunk=9, **options)
        assert (result.label, result.answer) == (chunked, "1")
        assert not able.group_requests
    for kinds in ((), (other,)):
        with pytest.raises(apr.UnsupportedEngine, match=f"does not decode groups of kind {name}"):
            run(name, "", "", engine=engine(*kinds), exact=True)
    with pytest.raises(apr.AprError, match="exact='yes'"):
        run(name, "", "", exact="yes")
    with pytest.raises(apr.AprError, match="exact='yes'"):
        check_arguments(name, Talk, {"exact": "yes"})
    check_arguments(name, Talk, {"exact": None})


def test_tools_need_the_chunked_form():
    def look(what: str) -> str:
        """Look."""
        return what

    with pytest.raises(apr.AprError, match="cannot wait for the result of a tool"):
        run("hogwild", "", "", exact=True, tools=[look])


def test_a_cancelled_run_aborts_its_workers():
    engine = apr.ScriptedEngine(speaker(*[apr.Reply("a" * 90, delay=0.01)] * 2), groups=KINDS)

    async def cancelled() -> None:
        work = asyncio.create_task(method("hogwild")(engine, "Question ", task=Talk(engine), workers=2))
        await asyncio.sleep(0.1)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(cancelled())
    assert not engine.active
    (prefix,) = engine.aborted
    assert all(request.rid.startswith(prefix) for request in engine.group_requests[0].requests)


def test_workers_open_as_in_the_papers():
    class Named(Talk):
        worker_prompts = CollaborativeTask.worker_prompts
        step_opening = CollaborativeTask.step_opening

    task = Named(apr.ScriptedEngine(lambda request, prompt: ""))
    context, prompts = task.worker_prompts("Q", 2, "hogwild")
    assert (context, [p.text for p in prompts]) == ("Q", ["**Alice [1]:** ", "**Bob [1]:** "])
    _, prompts = task.worker_prompts("Q", 2, "group_think")
    assert [p.text for p in prompts] == ["**Alice:** ", "**Bob:** "]
