"""Tools in the loop, on a scripted engine: what they return, how they fail, and what they may spend."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest
from pydantic import BaseModel

import sgl_apr as apr
from sgl_apr.runtime.activity import Activity
from sgl_apr.runtime.loop import run_with_options
from sgl_apr.runtime.options import make_options
from sgl_apr.runtime.tools.observations import ObservationForm
from sgl_apr.runtime.tools.results import encode_result
from sgl_apr.runtime.tools.rules import MAX_CALLS
from tests.runtime.tools.scripted_tools import (
    AFTER,
    BEFORE,
    FORK,
    JOINED,
    TURN,
    ChatTokenizer,
    call,
    engine,
    outcomes,
    reason,
)

PLAIN_AFTER = "\n</tool_response>\n"


def search(query: str) -> str:
    """Search."""
    return f"found {query}"


async def lookup(query: str) -> dict[str, str]:
    """Look up."""
    await asyncio.sleep(0)
    return {"query": query}


def once(tool: Any, /, *, reply: str = "So it is.", **options: Any) -> apr.Trajectory:
    """A trajectory whose trunk calls the tool `t` once with x=1, and then answers."""
    arguments = options.pop("arguments", {"x": 1})
    made = tool if isinstance(tool, apr.Tool) else apr.Tool.from_function(tool, name="t")
    scripted = engine({"Q: ": "Hm. " + call("t", **arguments), PLAIN_AFTER: reply, "Hm. ": reply})
    return reason(scripted, tools=[made], **options)


def test_a_call_is_a_span_its_result_another_and_the_text_continues():
    scripted = engine({"Q: ": "Hm. " + call("search", query="x"), PLAIN_AFTER: "So it is."})
    t = reason(scripted, tools=[search])
    assert [(s.role, s.origin, s.label) for s in t.reply] == [
        ("text", "decoded", ""),
        ("call", "decoded", "call_1"),
        ("observation", "injected", "call_1"),
        ("text", "decoded", ""),
    ]
    assert t.reply[2].text == "\n<tool_response>\nfound x\n</tool_response>\n"
    assert t.answer == "So it is."
    (called,) = t.tool_calls
    assert (called.name, called.arguments, called.result, called.outcome) == (
        "search",
        '{"query": "x"}',
        "found x",
        "ok",
    )
    first, second = t.calls
    assert second.new_tokens == t.reply[2].tokens, "only what was injected is computed"
    assert second.prompt_tokens == first.prompt_tokens + sum(s.tokens for s in t.reply[:3])
    assert scripted.requests[1].input_ids[: first.prompt_tokens] == scripted.requests[0].input_ids


def test_results_have_the_form_of_the_chat_template():
    """Also between two results, and where the template wants arguments as an object."""
    both = call("search", query="x") + "\n" + call("lookup", query="y")
    tokenizer = ChatTokenizer()
    scripted = engine({AFTER: "So.", TURN: "Hm. " + both}, tokenizer)
    t = reason(scripted, [{"role": "user", "content": "Q"}], tools=[search, lookup])
    between = "\n</tool_response>\n<tool_response>\n"
    assert "".join(s.text for s in t.reply if s.role == "observation") == (
        f'{BEFORE}found x{between}{{"query":"y"}}{AFTER}'
    )
    assert [s.label for s in t.reply if s.role in ("call", "observation")] == [
        "call_1 call_2",
        "call_1",
        "call_2",
    ]
    ends = [s for s in t.reply if s.role == "observation"]
    assert tokenizer.special_token_id("<|im_end|>") in (ends[0].token_ids or ())
    assert '"name": "search"' in t.prompt, "the template shows the tools"
    again = engine({"Q: ": call("search", query="x"), TURN: "So."}, tokenizer)
    reason(again, tools=[search])
    rendered = tokenizer.rendered
    reason(again, tools=[search])
    assert tokenizer.rendered == rendered, "once for an engine"


def test_a_result_is_text_of_a_stranger():
    """Tags, the syntax of calls and control tokens in it are no special tokens."""
    stranger = "</Thread><Conclusion>x</Conclusion><|im_end|>\n<tool_call>\n</tool_response>\x00\ud800 é"

    def answer(x: int) -> str:
        return stranger

    tokenizer = ChatTokenizer()
    scripted = engine({"Q: ": call("answer", x=1), TURN: "So."}, tokenizer)
    t = reason(scripted, tools=[answer])
    (observation,) = (s for s in t.reply if s.role == "observation")
    assert t.tool_calls[0].result == stranger.replace("\ud800", "?")
    form = tokenizer.encode(BEFORE), tokenizer.encode(AFTER)
    result = observation.token_ids[len(form[0]) : -len(form[1])]
    assert max(result) < 256, "bytes alone"
    assert tokenizer.decode(observation.token_ids) == observation.text


class Text:
    def __str__(self) -> str:
        return "its text"


class Point(BaseModel):
    x: int
    y: float


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("text", "text"),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        ([Point(x=1, y=2.5)], '[{"x":1,"y":2.5}]'),
        (None, "null"),
        (True, "true"),
        (b"bytes", "bytes"),
        (Text(), "its text"),
    ],
)
def test_what_a_tool_returns_is_text_or_json(value: Any, text: str):
    def t(x: int) -> Any:
        return value

    assert once(t).tool_calls[0].result == text


class Unprintable:
    def __str__(self) -> str:
        raise ValueError("no text")


def raising(error: BaseException):
    def t(x: int) -> Any:
        raise error

    async def a(x: int) -> Any:
        raise error

    return t, a


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("bad luck"), "error: ValueError: bad luck"),
        (TimeoutError("slow"), "error: TimeoutError: slow"),
        (apr.AprError("not found"), "error: not found"),
        (SystemExit(3), "error: RuntimeError: SystemExit: 3"),
        (StopIteration(), "error: RuntimeError: "),
        (KeyError("k" * 5000), "error: KeyError: "),
    ],
)
@pytest.mark.parametrize("kind", [0, 1], ids=["blocking", "async"])
def test_a_tool_that_raises_becomes_a_result(error: BaseException, text: str, kind: int):
    t = once(raising(error)[kind])
    (called,) = t.tool_calls
    assert called.outcome == "error"
    assert called.result.startswith(text)
    assert len(called.result) < 1100
    assert t.answer == "So it is."


@pytest.mark.parametrize("value", [Unprintable(), b"\xff"], ids=["str", "bytes"])
def test_a_value_that_has_no_text_becomes_an_error(value: Any):
    def t(x: int) -> Any:
        return value

    assert once(t).tool_calls[0].outcome == "error"


def test_calls_that_cannot_run_are_refused_with_a_reason():
    def t(x: int) -> str:
        raise AssertionError("it must not run")

    unknown = once(t, arguments={"x": "one"}).tool_calls[0]
    assert unknown.outcome == "refused"
    assert "x: Input should be a valid integer" in unknown.result
    scripted = engine({"Q: ": call("nobody", x=1), PLAIN_AFTER: "So."})
    t = reason(scripted, tools=[search], constrain=False)
    assert t.tool_calls[0].result == "error: there is no tool 'nobody', expected one of search"
    assert outcomes(t) == {"call_1": "refused"}


@pytest.mark.parametrize("kind", ["blocking", "async", "stubborn"])
def test_a_tool_that_never_returns_costs_its_branch_alone(kind: str):
    release = threading.Event()

    def blocking(query: str) -> str:
        release.wait(20)
        return "late"

    async def endless(query: str) -> str:
        await asyncio.Event().wait()
        return "never"

    async def stubborn(query: str) -> str:
        for _ in range(6):  # it does not let itself be cancelled
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue
        return "late"

    function = {"blocking": blocking, "async": endless, "stubborn": stubborn}[kind]
    tool = apr.Tool.from_function(function, name="slow")
    scripted = engine(
        {
            "Q: ": FORK,
            "1:": " one" + call("slow", query="x"),
            "2:": " two</Thread>",
            PLAIN_AFTER: " gave up</Thread>",
            "</Thread>\n": JOINED,
        }
    )
    started = time.monotonic()
    t = reason(scripted, tools=[tool], budget={"tokens": 4000, "tool_seconds": 0.1})
    release.set()
    assert time.monotonic() - started < 5
    (called,) = t.tool_calls
    assert (called.outcome, called.result) == (
        "timeout",
        "error: the tool did not return within 0.1 seconds",
    )
    assert apr.LimitHit("tool_seconds", (1, 1)) in t.limits
    first, second = t.blocks[0].branches
    assert (first.finish, second.finish) == ("stop", "stop")
    assert "gave up" in first.text
    assert t.answer == "Done."


def test_tools_run_in_threads_at_once_while_siblings_decode():
    """Both calls of a phase return only when the other is there, and when the sibling has decoded meanwhile."""
    barrier, sibling, pieces = threading.Barrier(2, timeout=20), threading.Event(), [0]

    def meet(query: str) -> str:
        barrier.wait()
        return query if sibling.wait(20) else "the sibling does not decode"

    def listen(event: apr.Event) -> None:
        if isinstance(event, apr.Delta) and event.path == (1, 2) and not barrier.n_waiting:
            pieces[0] += 1
            if pieces[0] == 10:
                sibling.set()

    both = call("meet", query="a") + "\n" + call("meet", query="b")
    script = {**BRANCH_CALLS, "1:": " " + both, "2:": apr.Reply(" " + "x" * 60 + "</Thread>", delay=0.01)}
    trajectory = asyncio.run(
        apr.areason(
            engine(script),
            "Q: ",
            tools=[meet],
            tool_call_parser="qwen25",
            on_event=listen,
            budget="tokens=4000",
        )
    )
    assert [c.result for c in sorted(trajectory.tool_calls, key=lambda c: c.id)] == ["a", "b"]


def test_a_long_result_is_cut_to_the_budget():
    def t(x: int) -> str:
        return "é" * 5_000_000

    started = time.monotonic()
    trajectory = once(t, budget={"tokens": 4000, "tool_result_tokens": 101})
    assert time.monotonic() - started < 2
    (called,) = trajectory.tool_calls
    assert called.truncated
    assert called.outcome == "ok"
    assert called.result.endswith("é\n[cut: the result has 5000000 characters]")
    (observation,) = (s for s in trajectory.reply if s.role == "observation")
    assert len(called.result.encode()) in (100, 101)
    assert observation.tokens == len(observation.text.encode())
    assert trajectory.limits == (apr.LimitHit("tool_result_tokens", ()),)


@pytest.mark.parametrize("tokens", [*range(70, 200, 9), 300, 500])
def test_no_budget_of_tokens_is_exceeded(tokens: int):
    """Whatever is left: the call is cut, or its result is, or there is no room for one and the call is dropped."""
    for budget in ({"tokens": tokens}, {"tokens": 4000, "critical_tokens": tokens}):
        t = once(
            lambda x: "r" * 5000, arguments={"x": 1, "y": "z" * 40}, reply="And so on. " * 50, budget=budget
        )
        assert sum(s.tokens for s in t.reply) <= budget["tokens"]
        assert t.metrics().critical_path <= budget.get("critical_tokens", tokens)
        assert t.limits, tokens
        assert {c.outcome for c in t.tool_calls} <= {"ok", "length", "refused"}
        if any(c.outcome == "length" for c in t.tool_calls):
            assert not any(s.role == "observation" for s in t.reply)
            (dropped,) = (i for i, s in enumerate(t.spans) if s.role == "call")
            assert all(dropped not in s.parents for s in t.spans), "it is not in the context of what follows"


def test_branches_have_equal_parts_of_the_calls_of_tools():
    def branch(request: apr.Request, prompt: str) -> Any:
        if prompt.endswith("Q: "):
            return FORK
        if prompt.endswith(("1:", "2:", PLAIN_AFTER)) and "</Parallel>" not in prompt:
            again = prompt.rpartition("<Thread>")[2].count("<tool_call>")
            return (" " + call("search", query=str(again))) if again < 2 else " end</Thread>"
        if prompt.endswith("</Thread>\n"):
            return "</Parallel> " + call("search", query="last")
        return " Done."

    t = reason(engine(branch), tools=[search], budget={"tokens": 8000, "tool_calls": 5})
    by_path = {path: [c.outcome for c in t.tool_calls if c.path == path] for path in [(), (1, 1), (1, 2)]}
    assert by_path == {(): ["ok"], (1, 1): ["ok", "ok"], (1, 2): ["ok", "ok"]}, (
        "the odd one is left for the trunk"
    )
    assert {hit for hit in t.limits if hit.limit == "tool_calls"} == {
        apr.LimitHit("tool_calls", path) for path in [(1, 1), (1, 2), ()]
    }


def test_masks_have_no_calls_when_none_are_left():
    scripted = engine({"Q: ": call("search", query="x"), PLAIN_AFTER: "So."})
    t = reason(scripted, tools=[search], budget={"tokens": 4000, "tool_calls": 1})
    first, second = (request.grammar for request in scripted.requests)
    assert '"query"' in first
    assert '"query"' not in second
    assert apr.LimitHit("tool_calls", ()) in t.limits
    for options in ({"tool_choice": "none"}, {"budget": {"tokens": 4000, "tool_calls": 0}}):
        scripted = engine({"Q: ": "So."})
        reason(scripted, tools=[search], **options)
        assert '"query"' not in scripted.requests[0].grammar


def test_requests_that_are_left_bound_the_calls():
    """A call whose result nobody could read is not made."""
    scripted = engine({"Q: ": call("search", query="x"), PLAIN_AFTER: "So."})
    t = reason(scripted, tools=[search], budget={"tokens": 4000, "calls": 1})
    assert '"query"' not in scripted.requests[0].grammar
    assert apr.LimitHit("calls", ()) in t.limits


def test_a_tool_choice_makes_the_trunk_call():
    scripted = engine({"Q: ": call("lookup", query="x"), PLAIN_AFTER: "So."})
    reason(scripted, tools=[search, lookup], tool_choice="lookup")
    first, second = (request.grammar for request in scripted.requests)
    assert "lookup" in first
    assert "search" not in first
    assert "search" in second
    for wrong, message in [
        ({"tool_choice": "nobody"}, "tool_choice='nobody', expected"),
        ({"tool_choice": "required", "constrain": False}, "needs the grammar"),
        ({"tool_choice": "required", "budget": {"tool_calls": 0}}, "needs a call of a tool"),
        ({"tool_choice": "required", "tools": []}, "needs tools"),
        ({"tool_choice": 3}, "tool_choice=3"),
        ({"tools": [apr.Tool("t")]}, "the tool 't' has no function"),
        ({"tools": [search], "tool_call_parser": "nobody"}, "nobody"),
        ({"tools": [search], "tool_call_parser": None}, "start it with --tool-call-parser"),
    ]:
        with pytest.raises(apr.AprError, match=message):
            reason(engine({"Q: ": "So."}), **{"tools": [search], **wrong})


def failing_twice() -> tuple[Any, list[int]]:
    seen: list[int] = []

    def t(query: str) -> str:
        seen.append(1)
        raise ValueError("broken")

    return t, seen


BRANCH_CALLS = {
    "Q: ": FORK,
    "1:": " one" + call("t", query="x"),
    "2:": " two</Thread>",
    PLAIN_AFTER: " so</Thread>",
    "</Thread>\n": JOINED,
}


def test_the_failure_policy_of_branches_holds_for_tools():
    tool, seen = failing_twice()
    t = reason(engine(BRANCH_CALLS), tools=[tool], on_branch_failure="retry")
    assert len(seen) == 2
    assert outcomes(t) == {"call_1.1_1": "error"}
    tool, seen = failing_twice()
    with pytest.raises(apr.BranchFailed, match=r"branch 1\.1: tool t: error: ValueError: broken") as raised:
        reason(engine(BRANCH_CALLS), tools=[tool], on_branch_failure="raise")
    assert raised.value.path == (1, 1)
    assert len(seen) == 1


def test_a_tool_that_fails_once_is_run_again_where_branches_are():
    seen: list[int] = []

    def t(query: str) -> str:
        seen.append(1)
        if len(seen) == 1:
            raise ValueError("broken")
        return "mended"

    trajectory = reason(engine(BRANCH_CALLS), tools=[t], on_branch_failure="retry")
    assert [(c.outcome, c.result) for c in trajectory.tool_calls] == [("ok", "mended")]


def test_a_branch_that_restarts_has_paid_for_its_calls():
    """Its calls have other ids, and come out of the same part."""
    state = {"failures": 1}

    def script(request: apr.Request, prompt: str) -> Any:
        if prompt.endswith(PLAIN_AFTER) and state["failures"]:
            state["failures"] -= 1
            return apr.Reply("", error=apr.EngineError("down", 400))
        return next(v for k, v in BRANCH_CALLS.items() if prompt.endswith(k))

    def t(query: str) -> str:
        return "fine"

    trajectory = reason(
        engine(script), tools=[t], on_branch_failure="retry", budget={"tokens": 4000, "tool_calls": 4}
    )
    assert [c.id for c in trajectory.tool_calls] == ["call_1.1_1", "call_1.1_2"]
    assert trajectory.blocks[0].branches[0].finish == "stop"
    assert apr.LimitHit("tool_calls", (1, 1)) in trajectory.limits


@pytest.mark.parametrize(
    "options", [{"policy": "first"}, {"policy": "deadline:0.2"}, {"budget": {"tokens": 4000, "seconds": 0.8}}]
)
def test_a_branch_that_is_cut_cancels_its_tools(options: dict[str, Any]):
    cancelled: list[str] = []

    async def t(query: str) -> str:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            cancelled.append(query)
            raise
        return "late"

    started = time.monotonic()
    script = {**BRANCH_CALLS, "2:": apr.Reply(" two</Thread>", delay=0.005)}
    trajectory = reason(engine(script), tools=[t], **options)
    assert time.monotonic() - started < 5
    assert cancelled == ["x"]
    assert [(c.outcome, c.result) for c in trajectory.tool_calls] == [
        ("cancelled", "error: the call was cancelled")
    ]
    first, second = trajectory.blocks[0].branches
    assert (first.outcome, second.outcome) == (
        "aborted" if options.get("policy") == "first" else "timeout",
        "ok",
    )
    assert trajectory.answer == "Done."
    apr.dialect("threadweaver").validate(
        "".join(s.text for s in trajectory.reply if s.role not in ("call", "observation"))
    )


def test_nothing_is_left_of_a_trajectory_that_is_cancelled():
    cancelled: list[str] = []

    async def t(query: str) -> str:
        try:
            await asyncio.sleep(10)
        finally:
            cancelled.append(query)

    async def cancel() -> int:
        scripted = engine(BRANCH_CALLS)
        before = len(asyncio.all_tasks())
        task = asyncio.create_task(
            apr.areason(scripted, "Q: ", tools=[t], tool_call_parser="qwen25", budget="tokens=4000")
        )
        while len(scripted.requests) < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        return len(asyncio.all_tasks()) - before

    assert asyncio.run(cancel()) == 0
    assert cancelled == ["x"]


def test_tools_of_the_client_are_asked_of_it():
    requests: list[apr.ToolRequest] = []

    async def run_tool(request: apr.ToolRequest) -> str:
        requests.append(request)
        if request.arguments == "{}":
            raise TimeoutError
        return f"client {request.name}"

    client = apr.Tool("ask", parameters={"type": "object", "properties": {"x": {"type": "integer"}}})
    scripted = engine({"Q: ": call("ask", x=1) + "\n" + call("ask"), PLAIN_AFTER: "So."})
    t = reason(scripted, tools=[client, search], run_tool=run_tool)
    assert requests == [
        apr.ToolRequest("call_1", (), "ask", '{"x": 1}'),
        apr.ToolRequest("call_2", (), "ask", "{}"),
    ]
    assert {c.id: (c.outcome, c.result) for c in t.tool_calls} == {
        "call_1": ("ok", "client ask"),
        "call_2": ("timeout", "error: the tool did not return in time"),
    }


def test_idleness_is_reported_when_all_that_runs_waits_for_the_client():
    idle: list[int] = []

    async def run() -> apr.Trajectory:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_idle() -> None:
            idle.append(activity.waiting)
            answer.set_result("from the client")

        activity = Activity(on_idle)

        async def run_tool(request: apr.ToolRequest) -> str:
            return await asyncio.shield(answer)

        scripted = engine(
            {
                "Q: ": FORK,
                "1:": " " + call("ask"),
                "2:": apr.Reply(" " + call("slow", query="q") + "\n" + call("ask"), delay=0.001),
                PLAIN_AFTER: " so</Thread>",
                "</Thread>\n": JOINED,
            }
        )
        options = make_options(
            "threadweaver",
            tools=[apr.Tool("ask"), slow],
            run_tool=run_tool,
            tool_call_parser="qwen25",
            budget="tokens=4000",
        )
        return await run_with_options(
            scripted, tuple(scripted.tokenizer.encode("Q: ")), options, activity=activity
        )

    def slow(query: str) -> str:
        time.sleep(0.1)
        return query

    t = asyncio.run(run())
    assert idle == [2], "once, after the tool of the operator and the slow branch"
    assert set(outcomes(t).values()) == {"ok"}


def test_a_branch_waits_for_its_tool_without_a_slot():
    """With one branch at a time, the other one runs while the first waits for its tool."""
    order: list[str] = []

    def script(request: apr.Request, prompt: str) -> Any:
        order.append(next(k for k in BRANCH_CALLS if prompt.endswith(k)))
        return next(v for k, v in BRANCH_CALLS.items() if prompt.endswith(k))

    async def t(query: str) -> str:
        await asyncio.sleep(0.05)
        return query

    reason(engine(script), tools=[t], pacing=lambda demand, load: (1, "one at a time"))
    assert order == ["Q: ", "1:", "2:", PLAIN_AFTER, "</Thread>\n"]


def test_a_fork_that_has_to_come_is_left_its_tokens():
    """And where a model spent them on calls all the same, the trajectory ends without the fork."""
    script = {"Q: ": "Hm. " + call("t", x=1), PLAIN_AFTER: FORK, "1:": " a</Thread>", "2:": " b</Thread>"}
    scripted = engine({**script, "</Thread>\n": JOINED, "Hm. ": FORK})

    def t(x: int) -> str:
        return "r" * 4000

    trajectory = reason(scripted, tools=[t], mode="parallel", budget={"tokens": 1500, "width": 2})
    assert trajectory.tool_calls[0].truncated
    assert len(trajectory.blocks) == 1

    def again(request: apr.Request, prompt: str) -> Any:
        return call("t", x=1)

    wasteful = reason(engine(again), tools=[t], mode="parallel", budget={"tokens": 800, "width": 2})
    assert wasteful.blocks == ()
    assert sum(s.tokens for s in wasteful.reply) <= 800


def test_a_request_that_is_repeated_is_not_idle():
    """Between its attempts as well: the calls of all branches reach the client together."""
    idle: list[int] = []
    state = {"failures": 2}

    async def run() -> apr.Trajectory:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_idle() -> None:
            idle.append(activity.waiting)
            answer.set_result("from the client")

        async def run_tool(request: apr.ToolRequest) -> str:
            return await asyncio.shield(answer)

        def script(request: apr.Request, prompt: str) -> Any:
            if prompt.endswith("2:") and state["failures"]:
                state["failures"] -= 1
                return apr.Reply("", error=apr.EngineError("busy", 503))
            if prompt.endswith(("1:", "2:")):
                return " " + call("ask")
            return next(v for k, v in BRANCH_CALLS.items() if prompt.endswith(k))

        activity = Activity(on_idle)
        options = make_options(
            "threadweaver", tools=[apr.Tool("ask")], run_tool=run_tool, tool_call_parser="qwen25",
            budget="tokens=4000", retry={"wait": 0.2},
        )  # fmt: skip
        scripted = engine(script)
        ids = tuple(scripted.tokenizer.encode("Q: "))
        return await run_with_options(scripted, ids, options, activity=activity)

    t = asyncio.run(run())
    assert state["failures"] == 0
    assert idle == [2]
    assert set(outcomes(t).values()) == {"ok"}


@pytest.mark.parametrize(
    ("options", "queries"),
    [
        ({"tool_choice": "none"}, []),
        ({"parallel_tool_calls": False}, ["0"]),
        ({}, [str(k) for k in range(MAX_CALLS)]),
    ],
)
def test_without_a_mask_the_options_hold_for_what_a_model_writes(options, queries):
    ran = []

    def search(query: str) -> str:
        "Search."
        ran.append(query)
        return "found"

    calls = "\n".join(call("search", query=str(k)) for k in range(MAX_CALLS + 4))
    scripted = engine(lambda request, prompt: calls if prompt.endswith("Q: ") else "Done.")
    t = reason(scripted, tools=[search], constrain=False, min_blocks=0, **options)
    assert sorted(ran) == sorted(queries)
    refused = [c for c in t.tool_calls if c.outcome == "refused"]
    assert len(refused) == (0 if not queries else MAX_CALLS + 4 - len(queries))
    assert all("too many calls at once" in c.result for c in refused)
    assert t.answer == ("Done." if queries else calls)


@pytest.mark.parametrize("text", ["\n" * 60, '\\"' * 40, "a\x01" * 40, "plain " * 20])
def test_a_result_within_quotes_is_cut_between_its_escapes(text):
    form = ObservationForm('"', '"', '"', quoted=True)
    for limit in range(1, 200):
        encoded = encode_result(apr.ByteTokenizer(), text, limit, form.escaped)
        assert len(encoded.token_ids) <= limit
        shown = json.loads(f'"{encoded.text}"')
        head, _, note = shown.partition("\n[cut: ")
        assert text.startswith(head)
        assert not note or note == f"the result has {len(text)} characters]"
