"""Forks of a warm context: tasks after one prompt share what they have in common, one budget, and a merge."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.methods.fork_task import MAX_TASKS
from sgl_apr.runtime import telemetry

DOCUMENT = "The document is long. "
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": DOCUMENT}]


class ChatTokenizer(apr.ByteTokenizer):
    """Bytes, and a chat template with tags."""

    def __init__(self) -> None:
        super().__init__(["<turn>", "</turn>"])

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        turns = "".join(f"<turn>{m['role']}\n{m['content']}</turn>\n" for m in messages)
        return f"{turns}<turn>assistant\n"


def echo(request: apr.Request, prompt: str) -> str:
    return f"[{prompt.removesuffix('</turn>' + chr(10) + '<turn>assistant' + chr(10))[-3:]}]"


def run_fork(script: Callable[..., Any] = echo, *arguments: Any, chat: bool = False, **options: Any):
    engine = apr.ScriptedEngine(script, ChatTokenizer() if chat else None)
    engine.joins_kv = options.pop("joins_kv", False)
    engine.context = options.pop("context", None)
    result = asyncio.run(apr.fork(engine, *arguments, **{"seed": 0, **options}))
    assert not engine.active
    check_sharing(result)
    return result, engine


def check_sharing(result: apr.ForkResult) -> None:
    """Every branch found what all have in common, and the trajectory is one that others can read."""
    for task in result.results:
        if task.usage.cached_tokens is not None and task.finish != "failed":
            assert task.usage.cached_tokens >= result.shared_tokens - 1
    trajectory = result.trajectory
    assert apr.Trajectory.from_json(trajectory.to_json()) == trajectory
    assert trajectory.metrics().reprefilled_tokens <= len(trajectory.calls)
    names = [branch.outline for branch in trajectory.blocks[0].branches]
    assert len(names) == len(result.results)


def test_tasks_continue_a_text_and_share_its_prefix():
    tasks = ["one", "two", apr.ForkTask("three", name="third", max_tokens=2)]
    result, engine = run_fork(echo, DOCUMENT, tasks)
    assert [r.text for r in result.results] == ["[one]", "[two]", "[r"]
    assert [r.name for r in result.results] == ["1", "2", "third"]
    assert [r.outcome for r in result.results] == ["ok", "ok", "length"]
    assert result["third"].path == (1, 3)
    assert engine.commits == [tuple(DOCUMENT.encode())]
    assert [len(r.input_ids) - result.shared_tokens for r in engine.requests] == [3, 3, 5]
    assert result.merged is None
    assert result.answer == "[one]\n\n[two]"
    roles = [(span.role, span.text, span.path) for span in result.trajectory.spans]
    assert roles[:3] == [("prompt", DOCUMENT, ()), ("header", "one", (1, 1)), ("body", "[one]", (1, 1))]
    assert result.trajectory.dialect == "fork"
    assert result.usage.output_tokens == sum(r.usage.output_tokens for r in result.results)


@pytest.mark.parametrize("tasks", [["one"], ["same one", "same two"], ["on", "one", "one more"]])
def test_prefixes_of_any_length_are_shared(tasks: list[str]):
    for chat in (False, True):
        result, engine = run_fork(echo, CHAT if chat else DOCUMENT, tasks, chat=chat)
        assert len(engine.commits) == 1
        assert len(engine.commits[0]) == result.shared_tokens
        assert result.shared_tokens >= len(DOCUMENT)
        prompts = [r.input_ids for r in engine.requests]
        if len(prompts) > 1:
            longest = min(len(p) for p in prompts)
            assert (
                result.shared_tokens == longest or len({p[: result.shared_tokens + 1] for p in prompts}) > 1
            )


def test_tasks_follow_a_conversation_as_messages():
    tasks = ["one", [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "two"}]]
    result, engine = run_fork(echo, CHAT, tasks, "Merge them.", chat=True)
    decode = engine.tokenizer.decode
    template = ChatTokenizer().apply_chat_template
    first, second, merge = (decode(r.input_ids) for r in engine.requests)
    assert first == template([*CHAT, {"role": "user", "content": "one"}])
    assert second == template([*CHAT, *tasks[1]])
    listing = "Result 1 (one):\n[one]\n\nResult 2 (two):\n[two]\n\nMerge them."
    assert merge == template([*CHAT, {"role": "user", "content": listing}])
    assert (result.merged, result.answer) == ("[em.]", "[em.]")
    assert result.trajectory.prompt == template(CHAT).removesuffix("assistant\n"), (
        "branches fork at the conversation"
    )
    last = result.trajectory.spans[-1]
    assert (last.role, last.path, result.trajectory.answer) == ("text", (), "[em.]")


@pytest.mark.parametrize("template", ["stable", "counts characters", "no tags"])
def test_long_conversations_are_encoded_a_few_times_for_any_number_of_tasks(template: str):
    """The prompts are those of the template, whatever it does with the conversation."""
    encoded = list[int]()

    class Tokenizer(ChatTokenizer):
        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            text = super().apply_chat_template(messages, **options)
            if template == "counts characters":
                text += f"{sum(len(m['content']) for m in messages)}: "
            return text.replace("<turn>", "").replace("</turn>", "") if template == "no tags" else text

        def encode(self, text: str, **options: Any) -> list[int]:
            if len(text) > 5000:
                encoded.append(len(text))
            return super().encode(text, **options)

    chat = [*CHAT, {"role": "assistant", "content": "x" * 5000}]
    tasks = [f"Part {k}" for k in range(20)]
    engine = apr.ScriptedEngine(echo, Tokenizer())
    result = asyncio.run(apr.fork(engine, chat, tasks, "Merge!", seed=0))
    check_sharing(result)
    turns = [[{"role": "user", "content": task}] for task in tasks]
    rendered = [Tokenizer().apply_chat_template([*chat, *turn]) for turn in turns]
    assert [engine.tokenizer.decode(r.input_ids) for r in engine.requests[:-1]] == rendered
    merged = engine.tokenizer.decode(engine.requests[-1].input_ids)
    assert merged.startswith(rendered[0].partition("Part 0")[0] + "Result 1 (Part 0):")
    assert (len(encoded) < 15) == (template == "stable")


def test_a_merge_is_placed_where_its_template_says():
    prompts = [
        "Read {results}, and merge.",
        [{"role": "system", "content": "S"}, {"role": "user", "content": "<{results}>"}],
    ]
    ends = []
    for prompt in prompts:
        _, engine = run_fork(echo, CHAT, ["one"], apr.Merge(prompt, max_tokens=3), chat=True)
        ends.append(engine.tokenizer.decode(engine.requests[-1].input_ids))
    assert "user\nRead Result 1 (one):\n[one], and merge.</turn>" in ends[0]
    assert "system\nS</turn>\n<turn>user\n<Result 1 (one):\n[one]></turn>" in ends[1]
    after_a_system_message = [{"role": "system", "content": "S"}]
    _, engine = run_fork(echo, CHAT, ["one"], after_a_system_message, chat=True)
    assert "[one]</turn>\n<turn>system\nS</turn>" in engine.tokenizer.decode(engine.requests[-1].input_ids)


def test_a_merge_in_the_kv_cache_continues_after_the_branches():
    for chat in (False, True):
        result, engine = run_fork(
            echo,
            CHAT if chat else DOCUMENT,
            ["one", "2"],
            apr.Merge("Now.", join="kv"),
            chat=chat,
            joins_kv=True,
        )
        last = engine.requests[-1]
        first, second = (
            r.input_ids[len(result.trajectory.spans[0].token_ids or ()) :] for r in engine.requests[:2]
        )
        fork, branches, rest = last.layout
        assert fork == len(result.trajectory.spans[0].token_ids or ())
        assert branches == ((len(first) + 5,), (len(second) + len(result["2"].text),))
        text = engine.tokenizer.decode(last.input_ids[-rest:])
        assert text == ("</turn>\n<turn>user\nNow.</turn>\n<turn>assistant\n" if chat else "\n\nNow.")
        assert [j.by for j in result.trajectory.joins] == ["kv"]
        assert result.merged == "[ow.]"


def test_the_first_cuts_the_others_and_a_deadline_cuts_those_that_are_late():
    def script(request: apr.Request, prompt: str) -> Any:
        return apr.Reply("abc" if prompt.endswith(("fast", "Merge")) else "d" * 5000, delay=0.001)

    result, _ = run_fork(script, DOCUMENT, ["fast", "slow", "slower"], policy="first")
    assert [r.finish for r in result.results] == ["stop", "aborted", "aborted"]
    assert set(result["2"].text) == {"d"}, "what it had written is kept"
    assert result.answer == "abc"
    result, engine = run_fork(script, DOCUMENT, ["fast", "slow"], "Merge", policy="deadline:0.05")
    assert [r.finish for r in result.results] == ["stop", "timeout"]
    assert "d\n(cut off: out of time)\n\nMerge" in engine.tokenizer.decode(engine.requests[-1].input_ids)
    result, _ = run_fork(script, DOCUMENT, ["fast", "slow", "fast  fast"], policy="quorum:2")
    assert [r.finish for r in result.results] == ["stop", "aborted", "stop"]


@pytest.mark.parametrize("tokens", [6, 20, 61])
def test_one_budget_holds_and_the_merge_keeps_its_reserve(tokens: int):
    def script(request, prompt):
        return "x" * 500

    result, _engine = run_fork(script, DOCUMENT, ["a", "b", "c"], "Merge", budget={"tokens": tokens})
    decoded = [len(s.token_ids or ()) for s in result.trajectory.spans if s.origin == "decoded"]
    assert sum(decoded) == tokens
    assert decoded[-1] >= tokens * 0.25
    assert {hit.limit for hit in result.trajectory.limits} == {"tokens"}


def test_tokens_that_a_task_leaves_go_to_the_others():
    def script(request: apr.Request, prompt: str) -> str:
        return "x" * (5 if prompt.endswith("short") else 500)

    result, _ = run_fork(
        script, DOCUMENT, ["short", "long", apr.ForkTask("own", max_tokens=10)], budget={"tokens": 300}
    )
    assert [r.usage.output_tokens for r in result.results] == [6, 285, 10]


def test_calls_are_divided_and_a_budget_that_cannot_do_is_refused():
    result, _engine = run_fork(echo, DOCUMENT, ["a", "b"], "Merge", budget={"calls": 4})
    assert result.trajectory.metrics().engine_calls == 4
    assert result.merged == "[rge]"
    for merge, calls, expected in (("Merge", 3, 4), (None, 2, 3)):
        with pytest.raises(apr.BudgetExceeded, match=f"calls={calls}, expected at least {expected}"):
            run_fork(echo, DOCUMENT, ["a", "b"], merge, budget={"calls": calls})
    with pytest.raises(apr.BudgetExceeded, match="0 tokens are left for 3 tasks"):
        run_fork(echo, DOCUMENT, ["a", "b", "c"], "Merge", budget={"tokens": 1})
    with pytest.raises(
        apr.BudgetExceeded, match="prompt of task 2 has 52 tokens, expected fewer than the 40"
    ):
        run_fork(echo, DOCUMENT, ["a", "b" * 30], context=40)


def test_everything_fits_into_the_context_of_the_engine():
    def script(request, prompt):
        return "x" * 500

    result, engine = run_fork(script, DOCUMENT, ["a", "b"], "Merge", context=160)
    assert max(len(r.input_ids) + r.max_tokens for r in engine.requests) <= 160
    assert result["1"].usage.output_tokens > 10
    assert len(result.merged or "") > 5


def test_a_task_has_limits_sampling_and_stops_of_its_own():
    def slow(request, prompt):
        return apr.Reply("x" * 5000, delay=0.001) if prompt.endswith("slow") else "one. two."

    tasks = [
        apr.ForkTask("slow", budget={"seconds": 0.03}),
        apr.ForkTask("stop", stop=".", sampling={"temperature": 0.5}),
        apr.ForkTask("also", stop=["two", "!"]),
    ]
    result, engine = run_fork(slow, DOCUMENT, tasks, temperature=0.25)
    assert [(r.text.rstrip("x"), r.finish) for r in result.results] == [
        ("", "timeout"),
        ("one", "stop"),
        ("one. ", "stop"),
    ]
    assert [r.sampling["temperature"] for r in engine.requests] == [0.25, 0.5, 0.25]


def test_nothing_of_a_token_follows_the_stop_text_that_it_contains():
    class Lines(apr.ByteTokenizer):
        """A tokenizer with a token of which a stop text is the beginning."""

        def __init__(self) -> None:
            super().__init__([".\n"])

    engine = apr.ScriptedEngine(lambda request, prompt: "one.\n", Lines())
    tasks = [apr.ForkTask("a", stop="."), apr.ForkTask("b", stop=["!", "e."]), apr.ForkTask("c", stop="x")]
    result = asyncio.run(apr.fork(engine, DOCUMENT, tasks, apr.Merge("Merge", stop=["."]), seed=0))
    assert [task.text for task in result.results] == ["one", "on", "one.\n"]
    assert result.merged == "one"


def test_a_worker_that_fails_is_a_result_that_says_so():
    def script(request: apr.Request, prompt: str) -> Any:
        failed.append(prompt)
        is_bad = prompt.endswith("bad") and (fails_always or failed.count(prompt) == 1)
        return apr.Reply("x", error=apr.EngineError("broken", status=400)) if is_bad else "ok"

    failed, fails_always = list[str](), True
    result, engine = run_fork(script, DOCUMENT, ["good", "bad"], "Merge")
    assert [(r.text, r.outcome) for r in result.results] == [("ok", "ok"), ("", "failed")]
    assert "Result 2 (bad):\n(failed)\n\nMerge" in engine.tokenizer.decode(engine.requests[-1].input_ids)
    assert result.answer == "ok"
    with pytest.raises(apr.BranchFailed, match=r"branch 1.2 \(2\): broken"):
        run_fork(script, DOCUMENT, ["good", "bad"], on_branch_failure="raise")
    failed, fails_always = [], False
    result, _ = run_fork(script, DOCUMENT, ["good", "bad"], on_branch_failure="retry")
    assert [(r.text, r.outcome) for r in result.results] == [("ok", "ok"), ("ok", "ok")]
    failed, fails_always = [], True
    result, engine = run_fork(
        script,
        DOCUMENT,
        ["good", "bad"],
        apr.Merge("Merge", join="kv"),
        joins_kv=True,
        on_branch_failure="retry",
    )
    assert len(engine.requests[-1].layout[1]) == 1, "what failed is not joined"
    assert engine.tokenizer.decode(engine.requests[-1].input_ids).endswith(
        "Result 1 (bad):\n(failed)\n\nMerge"
    )


def test_a_stream_has_the_events_of_each_branch_and_then_the_result():
    async def collect() -> list[Any]:
        engine = apr.ScriptedEngine(echo)
        return [event async for event in apr.stream_fork(engine, DOCUMENT, ["one", "two"], "Merge", seed=0)]

    *events, result = asyncio.run(collect())
    assert isinstance(result, apr.ForkResult)
    assert apr.rebuild(events) == result.trajectory
    assert [e for e in events if isinstance(e, apr.Forked)] == [
        apr.Forked((1,), (("1", "one"), ("2", "two")))
    ]
    for path, text in (((1, 1), "one[one]"), ((1, 2), "two[two]")):
        assert "".join(e.text for e in events if isinstance(e, apr.Delta) and e.path == path) == text
    assert [e.outcome for e in events if isinstance(e, apr.BranchEnded)] == ["ok", "ok"]
    assert [e.branches for e in events if isinstance(e, apr.Joined)] == [(1, 2)]


def test_leaving_a_stream_ends_all_branches():
    async def leave() -> apr.ScriptedEngine:
        engine = apr.ScriptedEngine(lambda request, prompt: apr.Reply("x" * 5000, delay=0.001))
        stream = apr.stream_fork(engine, DOCUMENT, ["one", "two"])
        async for event in stream:
            if isinstance(event, apr.Delta) and event.text == "x":
                break
        assert engine.active
        await stream.aclose()
        return engine

    engine = asyncio.run(leave())
    assert not engine.active
    assert engine.aborted


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((DOCUMENT, "one"), {}, "tasks='one', expected a list, each of which is text, chat messages, or an apr.ForkTask"),
        ((DOCUMENT, []), {}, f"tasks has 0 tasks, expected 1 to {MAX_TASKS}"),
        ((DOCUMENT, ["a"] * (MAX_TASKS + 1)), {}, f"tasks has {MAX_TASKS + 1} tasks, expected 1 to {MAX_TASKS}"),
        ((DOCUMENT, ["a", " "]), {}, "task 2: the prompt of a task is ' ', expected text that is not empty"),
        ((DOCUMENT, ["a", 3]), {}, "task 2: the prompt of a task is 3, expected text or chat messages"),
        ((DOCUMENT, ["a", "b", "a"]), {}, "tasks 1 and 3 are the same, expected different ones"),
        ((DOCUMENT, ["a", [{"role": "user", "content": "b"}]]), {}, "expected text: the prompt is text or token ids, not chat messages"),
        (("", ["a"]), {}, "the prompt is empty, expected the context that all tasks share"),
        ((DOCUMENT, ["a"], 3), {}, "merge: the prompt of a task is 3, expected text"),
        ((DOCUMENT, ["a"]), {"policy": "last"}, "policy='last', expected"),
        ((DOCUMENT, ["a"]), {"dialect": "apr"}, "no option 'dialect': a method has a fixed structure"),
        ((DOCUMENT, ["a"]), {"max_tokens": 3}, "each task has its own, as in apr.ForkTask"),
        ((DOCUMENT, ["a"]), {"temprature": 3}, "did you mean 'temperature'"),
        ((DOCUMENT, ["a"], apr.Merge("m", join="kv")), {}, "needs an engine that joins in its KV cache"),
        ((DOCUMENT, [apr.ForkTask("a", tool_choice="required")]), {}, "task 1: tool_choice='required' needs tools"),
        ((DOCUMENT, ["a"]), {"tool_choice": "required"}, "tool_choice='required' needs tools"),
        ((DOCUMENT, [apr.ForkTask("a", name="x"), apr.ForkTask("b", name="x")]), {}, "have the name 'x'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_sent(arguments: Any, options: Any, message: str):
    engine = apr.ScriptedEngine(echo)
    with pytest.raises(apr.AprError) as error:
        asyncio.run(apr.fork(engine, *arguments, **options))
    assert message in str(error.value)
    assert not engine.commits
    assert not engine.requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ["a"]}, "the prompt of a task is ['a'], expected text or chat messages"),
        ({"prompt": "a", "name": "x" * 201}, "expected one line of at most 200 characters"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens=0, expected at least 1"),
        ({"prompt": "a", "stop": ""}, "stop has '', expected text of 1 to 1000 characters"),
        ({"prompt": "a", "stop": ["a"] * 17}, "expected text, or a list of at most 16 texts"),
        ({"prompt": "a", "sampling": {"temperature": -1}}, "sampling temperature=-1, expected a number from 0"),
        ({"prompt": "a", "response_format": {"type": "xml"}}, "expected {\"type\": \"json_schema\""),
        ({"prompt": "a", "budget": {"width": 3}}, "the budget of a task has width=3, expected some of tokens, seconds"),
    ],
)  # fmt: skip
def test_a_task_is_checked_when_it_is_made(arguments: Any, message: str):
    with pytest.raises(apr.AprError) as error:
        apr.ForkTask(**arguments)
    assert message in str(error.value)


def test_a_merge_is_checked_when_it_is_made():
    with pytest.raises(apr.AprError, match='expected "text" or "kv"'):
        apr.Merge("a", join="message")  # type: ignore[arg-type]  # as the test wants
    with pytest.raises(apr.AprError, match="it sees the branches"):
        apr.Merge("Read {results}", join="kv")


def test_a_fork_is_exported_to_opentelemetry(monkeypatch: pytest.MonkeyPatch):
    exported = []
    monkeypatch.setattr(telemetry, "export", lambda *arguments, **named: exported.append((*arguments, named)))
    result, _ = run_fork(echo, DOCUMENT, ["one", "two"], "Merge")
    with pytest.raises(apr.BranchFailed):
        run_fork(
            lambda request, prompt: apr.Reply(error=apr.EngineError("broken", status=400)),
            DOCUMENT,
            ["one"],
            on_branch_failure="raise",
        )
    (name, calls, _, first), (*_, second) = exported
    assert (name, tuple(calls), first["error"]) == ("fork", result.trajectory.calls, None)
    assert first["attributes"]["apr.tokens"] == result.trajectory.metrics().total
    assert isinstance(second["error"], apr.BranchFailed)


def test_a_result_is_printed_without_its_trajectory_and_a_wrong_name_says_which_there_are():
    result = asyncio.run(
        apr.fork(apr.ScriptedEngine(echo), DOCUMENT, ["one", apr.ForkTask("two", name="costs")])
    )
    assert "trajectory" not in repr(result)
    with pytest.raises(KeyError, match="no result 'cost', expected one of 1, costs"):
        result["cost"]
