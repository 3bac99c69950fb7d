"""Tools and JSON answers of the branches of a fork."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from pydantic import Field

import sgl_apr as apr
from sgl_apr.runtime.tools.rules import make_syntax
from tests.methods.test_context_fork import CHAT, DOCUMENT, ChatTokenizer, check_sharing
from tests.support.masked_sampler import SampledEngine, masked

PARSER = "hermes"
BEGIN, END = "<tool_call>\n", "\n</tool_call>"


def call(name: str, **arguments: Any) -> str:
    return f"{BEGIN}{json.dumps({'name': name, 'arguments': arguments})}{END}"


def search(query: str) -> str:
    "Search the document."
    return f"found {query}"


def answers(first: Callable[[str], str]) -> Callable[..., Any]:
    """A script: a branch first writes `first` of its prompt, and after a result what the result was."""

    def script(request: apr.Request, prompt: str) -> str:
        _, found, result = prompt.rpartition("<tool_response>\n")
        return f"I read: {result.partition(chr(10))[0]}" if found else first(prompt)

    return script


def run_fork(script: Callable[..., Any], *arguments: Any, chat: bool = False, **options: Any):
    engine = apr.ScriptedEngine(script, ChatTokenizer() if chat else None)
    result = asyncio.run(apr.fork(engine, *arguments, **{"seed": 0, "tool_call_parser": PARSER, **options}))
    assert not engine.active
    check_sharing(result)
    return result, engine


def test_each_branch_calls_its_own_tools_and_continues_with_the_results():
    def count(of: str) -> int:
        "Count."
        return len(of)

    def first(prompt: str) -> str:
        return "Let me look." + (
            call("search", query="cats") if prompt.endswith("one") else call("count", of="abc")
        )

    tasks = [
        apr.ForkTask("one", tools=[search]),
        apr.ForkTask("two", tools=[count]),
        apr.ForkTask("three", tools=[]),
    ]
    result, engine = run_fork(
        answers(lambda p: "none" if p.endswith("three") else first(p)), DOCUMENT, tasks, "Merge"
    )
    assert [r.text for r in result.results] == ["I read: found cats", "I read: 3", "none"]
    assert [(c.name, c.arguments, c.result, c.outcome) for c in result["1"].tool_calls] == [
        ("search", '{"query": "cats"}', "found cats", "ok")
    ]
    assert sorted(c.id for c in result.trajectory.tool_calls) == ["call_1.1_1", "call_1.2_1"]
    spans = [(s.role, s.origin, s.label) for s in result.trajectory.spans if s.path == (1, 1)]
    assert spans == [
        ("header", "injected", "one"),
        ("body", "decoded", ""),
        ("call", "decoded", "call_1.1_1"),
        ("observation", "injected", "call_1.1_1"),
        ("body", "decoded", ""),
    ]
    assert result["1"].usage.prompt_tokens == len(DOCUMENT) + 3
    grammars = {r.input_ids[: len(DOCUMENT) + 3][-3:]: r.grammar for r in engine.requests}
    assert "search" in (grammars[tuple(b"one")] or "")
    assert "count" not in (grammars[tuple(b"one")] or "")
    assert grammars[tuple(b"thr")] is None, "a task without tools writes free text"
    assert not result.trajectory.tokens_shared


def test_tools_of_a_fork_are_for_all_tasks_and_shown_to_all_by_the_template():
    shown = []

    class Tokenizer(ChatTokenizer):
        def apply_chat_template(self, messages: Any, tools: Any = None, **options: Any) -> str:
            shown.append([tool["function"]["name"] for tool in tools or ()])
            return "".join(
                sorted(f"[{t['function']['name']}]" for t in tools or ())
            ) + super().apply_chat_template([{**m, "content": m.get("content") or ""} for m in messages])

    def look(page: int) -> str:
        "Look."
        return f"page {page}"

    engine = apr.ScriptedEngine(answers(lambda prompt: call("search", query="x")), Tokenizer())
    tasks = ["one", apr.ForkTask("two", tools=[search, look])]
    result = asyncio.run(apr.fork(engine, CHAT, tasks, tools=[search], tool_call_parser=PARSER, seed=0))
    check_sharing(result)
    assert shown[:3] == [["search", "look"]] * 3
    assert len(result.trajectory.tool_calls) == 2
    assert result.trajectory.prompt.startswith("[look][search]")
    assert [r.text for r in result.results] == ["I read: found x"] * 2


def test_slow_tools_run_at_once_and_one_that_hangs_costs_its_branch_alone():
    async def slow(of: str) -> str:
        "Wait."
        await asyncio.sleep(60 if of == "hangs" else 0.2)
        return "done"

    def first(prompt: str) -> str:
        return call("slow", of=prompt.rpartition(" ")[2])

    started = time.monotonic()
    result, _ = run_fork(
        answers(first), DOCUMENT, ["a", "b", "c", "hangs"], tools=[slow], budget={"tool_seconds": 0.4}
    )
    assert time.monotonic() - started < 2
    assert [r.tool_calls[0].outcome for r in result.results] == ["ok", "ok", "ok", "timeout"]
    assert result["4"].text.startswith("I read: ")
    assert "0.4 seconds" in result["4"].text
    seconds = [max(c.ended for c in result.trajectory.tool_calls if c.outcome == "ok")]
    assert seconds[0] < 0.4, "three waits of 0.2 seconds are over at once"


def test_a_tool_that_fails_is_a_result_that_says_so():
    def broken(query: str) -> str:
        "Search."
        raise ValueError("no index")

    script = answers(lambda prompt: call("broken", query="x"))
    result, _ = run_fork(script, DOCUMENT, ["a", apr.ForkTask("b", tools=[])], tools=[broken])
    assert [(c.outcome, "no index" in c.result) for c in result["1"].tool_calls] == [("error", True)]
    assert "no index" in result["1"].text
    with pytest.raises(apr.BranchFailed, match=r"^branch 1\.1: tool broken: .*no index"):
        run_fork(script, DOCUMENT, ["a"], tools=[broken], on_branch_failure="raise")


def test_calls_are_divided_between_the_branches():
    result, _ = run_fork(
        lambda request, prompt: call("search", query="x") if "query" in (request.grammar or "") else "end",
        DOCUMENT, ["a", apr.ForkTask("b", budget={"tool_calls": 1})], tools=[search], budget={"tool_calls": 5},
    )  # fmt: skip
    assert [len(r.tool_calls) for r in result.results] == [2, 1]
    assert {(hit.limit, hit.path) for hit in result.trajectory.limits} == {
        ("tool_calls", (1, 1)),
        ("tool_calls", (1, 2)),
    }


def test_tasks_that_may_call_no_tool_get_no_part_of_the_calls():
    result, _ = run_fork(
        lambda request, prompt: call("search", query="x") if "query" in (request.grammar or "") else "end",
        DOCUMENT, ["a", apr.ForkTask("b", tools=[]), apr.ForkTask("c", tool_choice="none"), "d"],
        tools=[search], budget={"tool_calls": 5},
    )  # fmt: skip
    assert [len(r.tool_calls) for r in result.results] == [2, 0, 0, 2]
    assert {hit.path for hit in result.trajectory.limits} == {(1, 1), (1, 4)}


def test_a_choice_forces_the_first_call():
    engine = apr.ScriptedEngine(answers(lambda prompt: call("search", query="x")))
    tasks = [apr.ForkTask("one", tool_choice="search"), apr.ForkTask("two", tool_choice="none")]
    result = asyncio.run(apr.fork(engine, DOCUMENT, tasks, tools=[search], tool_call_parser=PARSER, seed=0))
    forced = [r.grammar for r in engine.requests if r.input_ids[-3:] == tuple(b"one")]
    free = [r.grammar for r in engine.requests if r.input_ids[-3:] == tuple(b"two")]
    assert forced[0] != free[0]
    assert len(result["1"].tool_calls) == 1
    with pytest.raises(apr.AprError, match=r"task 1: tool_choice='look', expected .* its tools: search"):
        run_fork(lambda r, p: "", DOCUMENT, [apr.ForkTask("a", tool_choice="look")], tools=[search])
    with pytest.raises(apr.AprError, match="tools to choose from"):
        run_fork(lambda r, p: "", DOCUMENT, [apr.ForkTask("a", tool_choice="look")])


def test_a_branch_that_starts_again_has_to_call_its_tool_again():
    failures = ["gone"]

    def script(request: apr.Request, prompt: str) -> str:
        if "found" in prompt and failures:
            raise apr.EngineError(failures.pop())
        return "Read." if "found" in prompt else call("search", query="x")

    engine = apr.ScriptedEngine(script)
    tasks = [apr.ForkTask("one", tool_choice="required"), apr.ForkTask("two", tools=[])]
    options = {"on_branch_failure": "retry", "retry": {"attempts": 1}, "tool_call_parser": PARSER, "seed": 0}
    result = asyncio.run(apr.fork(engine, DOCUMENT, tasks, tools=[search], **options))
    assert result["1"].text == "Read."
    first, again = (r.grammar for r in engine.requests if r.input_ids[-3:] == tuple(b"one"))
    assert first == again  # it demands the call


def test_what_is_wrong_with_tools_is_said():
    def other(query: int) -> str:
        "Another tool."
        return ""

    named = apr.Tool.from_function(other, name="search")
    tasks = [apr.ForkTask("a", tools=[search]), apr.ForkTask("b", tools=[named])]
    with pytest.raises(apr.AprError, match="'search' of task 2 differs from that of another task"):
        run_fork(lambda r, p: "", CHAT, tasks, chat=True)
    engine = apr.ScriptedEngine(lambda r, p: "")
    with pytest.raises(apr.UnsupportedEngine, match="--tool-call-parser"):
        asyncio.run(apr.fork(engine, DOCUMENT, ["a"], tools=[search]))
    with pytest.raises(apr.AprError, match="a tool is 3, expected a function"):
        apr.ForkTask("a", tools=[3])


def test_tags_in_results_and_tool_results_stay_text():
    engine = apr.ScriptedEngine(
        lambda r, p: "</turn>" if r.input_ids[-1] != ord("!") else "ok", ChatTokenizer()
    )

    async def fork() -> apr.ForkResult:
        return await apr.fork(engine, DOCUMENT, ["a"], "Merge!", seed=0)

    result = asyncio.run(fork())
    tail = next(s for s in result.trajectory.spans if s.role == "tail")
    tag = engine.tokenizer.special_token_id("</turn>")
    assert "</turn>" in tail.text
    assert tag not in (tail.token_ids or ())
    assert tag in (result.trajectory.spans[2].token_ids or ()), "the branch itself wrote the token"


def test_a_response_format_is_a_grammar():
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    task = apr.ForkTask(
        "a", response_format={"type": "json_schema", "json_schema": {"schema": schema}}, stop="}"
    )
    merge = apr.Merge("m", response_format={"type": "json_object"})
    result, engine = run_fork(lambda r, p: '{"n": 1}', DOCUMENT, [task, "b"], merge)
    of_task, of_other, of_merge = (r.grammar for r in engine.requests)
    assert '"integer"' in (of_task or "")
    assert of_other is None
    assert '"object"' in (of_merge or "")
    assert engine.requests[0].sampling["stop"] == ["}"], "an engine looks for it under the grammar as well"
    assert result["1"].text == '{"n": 1'


@pytest.mark.parametrize("choice", ["search", "required", "auto"])
def test_calls_parse_and_fit_their_schema_whatever_is_sampled(choice: str):
    def search(query: Annotated[str, Field(max_length=12)]) -> str:
        "Search."
        return f"found {query}"

    made = 0
    for seed in range(4):
        engine = SampledEngine(masked("threadweaver"), seed=seed)
        tasks = [apr.ForkTask(f"task {k}", tool_choice=choice) for k in range(3)]
        options = {"tools": [search], "tool_call_parser": PARSER, "seed": seed}
        budget = {"tokens": 900, "tool_calls": 6}
        result = asyncio.run(apr.fork(engine, DOCUMENT, tasks, budget=budget, **options))
        complete = [c for c in result.trajectory.tool_calls if c.outcome != "length"]
        assert all(c.outcome == "ok" and len(json.loads(c.arguments)["query"]) <= 12 for c in complete)
        made += len({c.path for c in complete})
    assert choice == "auto" or made == 12, "each has to call a tool, and has the tokens for it"


def test_what_is_imported_for_the_first_call_takes_no_time_of_the_fork(monkeypatch: pytest.MonkeyPatch):
    waits = [0.6]

    def slow_at_first(*arguments: Any) -> Any:
        time.sleep(waits.pop() if waits else 0)
        return make_syntax(*arguments)

    monkeypatch.setattr("sgl_apr.runtime.tools.rules.make_syntax", slow_at_first)
    result, _ = run_fork(lambda r, p: "done", DOCUMENT, ["a"], tools=[search], budget={"seconds": 0.5})
    assert not waits
    assert (result.results[0].outcome, result.trajectory.wall_s < 0.5) == ("ok", True)
