"""Hogwild! by chunks: the shared history, the current steps, where a step ends, and when the method ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.problems import Problem
from sgl_apr.evaluation.tasks.countdown.search import sequential_search
from sgl_apr.evaluation.tasks.countdown.task import CountdownTask
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.task import CollaborativeTask, Inapplicable, Task


class Talk(CollaborativeTask[str]):
    """What a worker sees: `Q{what is finished}[what others write]own`. An answer follows "=", up to a period."""

    name, max_tokens, redundancy_question = "talk", 20, "?"

    def shared_context_prompt(
        self, problem: str, own: str, others: Sequence[str], past: str = ""
    ) -> tuple[str, Prompt]:
        return f"{problem}{{{past}}}[{'/'.join(others)}]{own}", Prompt()

    def step_opening(self, worker: int, number: int) -> str:
        return f"{worker}.{number}:"

    def answer(self, text: str) -> str:
        return text.partition("=")[2].strip(".\n")


def speaker(*texts: str) -> Any:
    """Worker k says texts[k], whatever it is asked; who it is, it knows by what its step begins with."""
    said = [0] * len(texts)

    def script(request: apr.Request, prompt: str) -> apr.Reply:
        k = int(prompt.rpartition("]")[2][0]) - 1
        rest = texts[k][said[k] :]
        cut = rest.find("\n\n") + 2 if "\n\n" in request.stop and "\n\n" in rest else len(rest)
        said[k] += min(cut, request.max_tokens)
        return apr.Reply(rest, delay=0.001)

    return script


def work(script: Any, task: type[Task[str]] = Talk, **options: Any) -> tuple[MethodResult, list[str]]:
    engine = apr.ScriptedEngine(script)
    options = {"chunk": 4, "seed": 0, **options}
    found = asyncio.run(method("hogwild")(engine, "Q", task=task(engine), **options))
    assert not engine.active
    return found, [bytes(r.input_ids).decode() for r in engine.requests]


def test_a_step_moves_to_the_history_that_all_see():
    found, prompts = work(speaker("one.\n\ntwo=1.\n\n", "a longer step.\n\n"))
    assert prompts == [
        "Q{}[]1.1:", "Q{}[]2.1:",
        "Q{}[2.1:a lo]1.1:one.", "Q{}[1.1:one.]2.1:a lo",
        "Q{1.1:one.\n\n}[2.1:a longer]1.2:", "Q{1.1:one.\n\n}[]2.1:a longer",
        "Q{1.1:one.\n\n}[2.1:a longer ste]1.2:two=", "Q{1.1:one.\n\n}[1.2:two=]2.1:a longer ste",
    ]  # fmt: skip
    assert (found.answer, found.label) == ("1", "hogwild-chunk(4)")


def test_one_answer_is_enough_and_it_may_be_more():
    found, prompts = work(speaker("a=1.\n\n" + "b" * 30, "c" * 30), chunk=6)
    assert (found.answer, found.score, len(prompts)) == ("1", 0.5, 2)
    found, prompts = work(speaker("a=1.\n\n" + "b" * 30, "ccc.\n\nd=2"), chunk=6, enough=2)
    assert found.answer == "1", "of as many votes the first"
    assert len(prompts) == 4


def test_a_worker_that_has_ended_writes_no_more():
    found, prompts = work(speaker("so.", "ab.\n\ncd.\n\ne=4"), chunk=6)
    assert found.answer == "4"
    assert [p.rpartition("]")[2] for p in prompts] == ["1.1:", "2.1:", "2.2:", "2.3:"]
    assert prompts[-1].startswith("Q{1.1:so.\n\n2.1:ab.\n\n2.2:cd.\n\n}[]")


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("it is.\n\n", True),
        ("is it?\n\n", True),
        ("namely:\n\n", False),
        ("```\nx.\n\n", False),
        ("a\n", False),
    ],
)
def test_where_a_step_ends(text: str, ends: bool):
    assert CollaborativeTask(apr.ScriptedEngine(speaker(""))).is_step_complete(text) is ends
    _, prompts = work(speaker(text + "more"), workers=1, chunk=20)
    assert prompts[1:] == (
        [f"Q{{1.1:{text}}}[]1.2:"] if ends else [f"Q{{}}[]1.1:{text}"] if "\n\n" in text else []
    )


def test_some_steps_open_with_the_question_whether_they_are_redundant():
    steps = "".join(f"{k:3}.\n\n" for k in range(8))
    _, prompts = work(speaker(steps, steps), chunk=6, every=41)
    openings = [p.rpartition("]")[2] for p in prompts]
    asked = [k for k, opening in enumerate(openings) if opening.endswith("?")]
    assert openings[asked[0]] == "1.4:?", "after two steps of each there are 40 tokens"
    assert all(later - former > 3 for former, later in pairwise(asked))


def test_the_default_texts_are_those_of_the_paper():
    class Plain(Talk):
        step_opening = CollaborativeTask.step_opening
        redundancy_question = CollaborativeTask.redundancy_question

    engine = apr.ScriptedEngine(lambda request, prompt: "a.\n\n")
    found = asyncio.run(
        method("hogwild")(engine, "Q", task=Plain(engine), workers=3, every=1, budget=apr.Budget(tokens=400))
    )
    texts = [span.text for span in found.trajectory.spans if span.role == "header"]
    assert texts[:3] == ["**Alice [1]:** ", "**Bob [1]:** ", "**Carol [1]:** "]
    assert texts[3] == "**Alice [2]:** Wait, am I doing redundant work? (yes/no): "
    assert texts[4] == "**Bob [2]:** "


def test_chunks_are_written_in_parallel_and_copies_are_not_counted():
    script = speaker("abcdefgh", "stuvwxyz")
    engine = apr.ScriptedEngine(script)
    most, decode = 0, engine.decode

    async def counted(request: apr.Request, on_tokens: Any = None) -> apr.Result:
        nonlocal most
        most = max(most, len(engine.active) + 1)
        return await decode(request, on_tokens)

    engine.decode = counted  # type: ignore[method-assign]
    found = asyncio.run(method("hogwild")(engine, "Q", task=Talk(engine), chunk=4))
    assert most == 2
    assert found.metrics.total == 2 * (len("1.1:") + 8)
    assert found.metrics.critical_path == len("1.1:") + 8
    calls = [c for c in found.trajectory.calls if c.cached_tokens is not None]
    assert all(c.cached_tokens >= c.shared_tokens - 1 for c in calls)


@pytest.mark.parametrize("tokens", [1, 5, 9, 30])
def test_a_budget_is_kept(tokens: int):
    found, _ = work(speaker("a" * 90, "b" * 90), budget=apr.Budget(tokens=tokens))
    assert found.metrics.total <= tokens
    assert {limit.limit for limit in found.trajectory.limits} == {"tokens"}


def test_a_failure_stays_with_its_worker():
    talk = speaker("abcdefgh", "uvw.\n\nx=2.\n\n")

    def broken(request: apr.Request, prompt: str) -> apr.Reply:
        return (
            apr.Reply(error=apr.EngineError("broken", 400))
            if "]1.1:abcd" in prompt
            else talk(request, prompt)
        )

    found, prompts = work(broken)
    assert found.answer == "2"
    assert "[1.1:abcd]" in prompts[-1], "what it had written stays"


def test_invalid_arguments_and_tasks_are_errors():
    for name in ("workers", "chunk", "every", "enough"):
        with pytest.raises(apr.AprError, match=f"{name}=0, expected at least 1"):
            work(speaker(""), **{name: 0})

    class Plain(Task[str]):
        name = "plain"

    with pytest.raises(Inapplicable, match="plain cannot be thought about together"):
        work(speaker(""), Plain)


def test_countdown_has_lines_for_steps_and_no_words():
    problem = Problem((3, 7, 8), 18)
    tokenizer = apr.ByteTokenizer(apr.dialect("spawn").tags)
    lines = sequential_search(problem, 500).removeprefix("\n").splitlines(keepends=True)
    said = iter(lines * 2)

    def script(request: apr.Request, prompt: str) -> str:
        assert request.stop == ("\n",)
        return next(said)

    engine = apr.ScriptedEngine(script, tokenizer)
    task = CountdownTask(engine)
    found = asyncio.run(method("hogwild")(engine, problem, task=task, workers=1, chunk=99, every=1))
    assert task.verify(problem, found.answer)
    prompts = [tokenizer.decode(r.input_ids) for r in engine.requests]
    assert prompts == [problem.text + "\n" + "".join(lines[:k]) for k in range(len(lines))]
    context, workers = task.worker_prompts(problem, 2, "hogwild")
    assert (context, [w.text for w in workers]) == (problem.text, ["\n", "\n"]), (
        "as one group: the same search"
    )
    assert all(w.grammar == task.prompt(problem).grammar for w in workers)
    seen, _ = task.shared_context_prompt(problem, " 7- 3", [" 8- 7= 1,", ""], " 3+ 7= 10, 8> 18 2\n")
    assert seen == problem.text + "\n 3+ 7= 10, 8> 18 2\n 8- 7= 1,\n 7- 3"
