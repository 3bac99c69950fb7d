"""Recursive language models against the paper: what the model sees, what its programs may query, and the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.methods.recursive import final_call, split_blocks
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.sandbox.process import SandboxLimits
from sgl_apr.methods.task import Inapplicable, ProgramTask, Task

TEXT = "one\ntwo\nthree\n" * 100
QUICK = SandboxLimits(seconds=5.0)


class Reading(ProgramTask[str]):
    name = "reading"

    def program(self, problem: str) -> tuple[str, str]:
        return problem, TEXT

    def answer(self, text: str) -> str:
        return text.strip()

    def chat_turn(self, text: str, *, first: bool = True) -> str:
        return f"{'' if first else chr(10)}<{text}>"


def writer(*replies: str, says: Callable[[str], str] = str.upper) -> Any:
    """The model that writes programs gives these replies in turn; what a program asks is answered by `says`."""
    left = iter(replies)

    def script(request: apr.Request, prompt: str) -> str:
        return next(left) if "REPL" in prompt else says(prompt[1:-1])

    return script


def read(script: Any, **options: Any) -> tuple[MethodResult, list[str], apr.ScriptedEngine]:
    """What it comes to, all prompts, and the engine."""
    engine = apr.ScriptedEngine(script)
    options = {
        "allow_code": True, "seed": 0, "limits": QUICK, "budget": apr.Budget(tokens=1 << 16), **options
    }  # fmt: skip
    found = asyncio.run(method("recursive")(engine, "How many?", task=Reading(engine), **options))
    assert not engine.active
    return found, [bytes(r.input_ids).decode() for r in engine.requests], engine


def block(code: str) -> str:
    return f"Let me see.\n```repl\n{code}\n```\n"


def test_no_code_runs_without_permission():
    with pytest.raises(apr.CodeForbidden, match="allow_code=True"):
        read(writer(""), allow_code=False)
    engine = apr.ScriptedEngine(writer(""))
    with pytest.raises(apr.CodeForbidden):
        asyncio.run(method("recursive")(engine, "How many?", task=Reading(engine)))
    assert engine.requests == []


def test_the_text_is_a_variable_and_only_what_is_printed_is_seen():
    found, prompts, _ = read(
        writer(block("n = context.count('two')\nprint(n)"), block("n += 1"), "FINAL_VAR(n)"),
    )
    assert (found.answer, found.label) == ("101", "exact")
    assert f"a string of {len(TEXT)} characters that begins with {TEXT[:80]!r}" in prompts[0]
    assert "How many?" in prompts[0]
    assert all(TEXT[:100] not in prompt for prompt in prompts)
    assert prompts[1].startswith(prompts[0] + "Let me see.\n```repl"), "it sees all that it wrote"
    assert prompts[1].endswith(
        "```\n\n<REPL output:\n100\n\n\nGo on, or give the answer to the question: How many?>"
    )
    assert prompts[2].endswith("\n<REPL output:\n\n\nGo on, or give the answer to the question: How many?>")


@pytest.mark.parametrize(
    ("last", "answer"),
    [
        ("FINAL(42)", "42"),
        ("So it is:\n  FINAL(f(x) = (1 + 2))\n", "f(x) = (1 + 2)"),
        ("FINAL(two\nlines)", "two\nlines"),
        ("FINAL_VAR('x')", "7"),
        (block("x = 8") + "FINAL_VAR(x)", "8"),
        (block("FINAL(x + 2)"), "9"),
        (block("FINAL_VAR('x')"), "7"),
        (block("FINAL(1)") + block("FINAL(2)"), "1"),
    ],
)
def test_an_answer(last: str, answer: str):
    found, prompts, _ = read(writer(block("x = 7"), last))
    assert found.answer == answer
    assert len(prompts) == 2


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        ("I think about it.", "(nothing was run"),
        ("FINAL_VAR(nothing)", "there is no variable nothing"),
        (block("# FINAL(3)"), "REPL output:\n\n"),
        (block("1 / 0"), "Traceback (most recent call last)"),
        (block("while True: pass"), "stopped: it took more than 1 s; its variables are lost"),
        (block("print('a' * 100)"), "a" * 60 + "... + [41 chars...]"),
        ("```python\nprint(3)\n```", "(nothing was run"),
    ],
)
def test_invalid_replies_are_reported_to_the_model(reply: str, shown: str):
    found, prompts, _ = read(writer(reply, "FINAL(ok)"), limits=SandboxLimits(seconds=1.0, output=60))
    assert found.answer == "ok"
    assert shown in prompts[1]


def test_programs_ask_models_that_see_nothing_else():
    asked = 'parts = context.split("\\n")[:3]\nprint(llm_query_batched(parts), llm_query("last"))'
    found, prompts, _ = read(writer(block(asked), "FINAL(done)"))
    assert prompts[1:5] == ["<one>", "<two>", "<three>", "<last>"]
    assert "['ONE', 'TWO', 'THREE'] LAST" in prompts[5]
    output = next(span for span in found.trajectory.spans if span.text.startswith("\n<REPL"))
    own = sum(span.tokens for span in found.trajectory.spans if not span.path and span.origin != "prompt")
    assert found.metrics.critical_path == own + len("<three>THREE") + len("<last>LAST"), "one after the other"
    assert len(output.waits_for) == 4, "what follows waits for all of them"
    assert apr.Trajectory.from_json(found.trajectory.to_json()) == found.trajectory


def test_a_batch_of_queries_runs_in_parallel():
    batch = block("print(len(llm_query_batched([str(k) for k in range(6)])))")

    def script(request: apr.Request, prompt: str) -> apr.Reply:
        if "REPL" not in prompt:
            return apr.Reply("yes", delay=0.01)
        return apr.Reply("FINAL(ok)" if "REPL output" in prompt else batch)

    for at_once, most in ((16, 6), (4, 4)):
        engine = apr.ScriptedEngine(script)
        seen, decode = 0, engine.decode

        async def counted(
            request: apr.Request, on_tokens: Any = None, engine: Any = engine, decode: Any = decode
        ) -> apr.Result:
            nonlocal seen
            seen = max(seen, len(engine.active) + 1)
            return await decode(request, on_tokens)

        engine.decode = counted  # type: ignore[method-assign]
        found = asyncio.run(
            method("recursive")(engine, "?", task=Reading(engine), allow_code=True, concurrency=at_once)
        )
        assert found.answer == "ok"
        assert seen == most


def test_queries_are_limited():
    _, prompts, _ = read(
        writer(block("print(llm_query_batched(['a', 'b', 'c']))\nprint(llm_query('d'))"), "FINAL(ok)"),
        queries=2,
    )
    assert [p for p in prompts if "REPL" not in p] == ["<a>", "<b>"]
    assert "['A', 'B', '(no answer: no more queries)']\n(no answer: no more queries)" in prompts[-1]


def test_recursive_queries_write_programs_of_their_own():
    def script(request: apr.Request, prompt: str) -> str:
        if "REPL" not in prompt:
            return prompt.upper()
        if "How many?" in prompt.split("Question: ")[1].split(">")[0]:
            if "REPL output" in prompt:
                return "FINAL(" + prompt.rpartition("REPL output:\n")[2].split("\n")[0] + ")"
            return block("print(rlm_query_batched(['abc', 'defg']))")
        if "REPL output" in prompt:
            return "FINAL_VAR(found)"
        return block("found = f'{len(context)}{llm_query(context)}'")

    found, prompts, _ = read(script, depth=2)
    assert found.answer == "['3<ABC>', '4<DEFG>']"
    assert "rlm_query" in prompts[0]
    deeper = [p for p in prompts if "begins with 'abc'" in p]
    assert len(deeper) == 2
    assert "rlm_query" not in deeper[0].split("Question")[0], "which ask models that only answer"
    assert apr.Trajectory.from_json(found.trajectory.to_json()) == found.trajectory
    assert found.metrics.critical_path < found.metrics.total


def test_without_models_to_ask():
    found, prompts, _ = read(writer(block("print(llm_query('a'))"), "FINAL(ok)"), depth=0)
    assert found.answer == "ok"
    assert "llm_query" not in prompts[0]
    assert "(there is no model to ask)" in prompts[1]


def test_rlm_queries_at_depth_one_are_plain():
    _, prompts, _ = read(writer(block("print(rlm_query('a'))"), "FINAL(ok)"))
    assert prompts[1] == "<a>"


def test_the_model_is_asked_for_an_answer_at_the_end():
    found, prompts, _ = read(writer(*[block("print(1)")] * 3, "It is one."), iterations=3)
    assert found.answer == "It is one."
    assert len(prompts) == 4
    assert "Give the final answer to the question now" in prompts[-1]


@pytest.mark.parametrize("tokens", [1, 60, 200, 400])
def test_a_budget_is_kept(tokens: int):
    batch = block("print(llm_query_batched([str(k) * 9 for k in range(9)]))")
    found, *_ = read(writer(*[batch] * 30), budget=apr.Budget(tokens=tokens))
    assert found.metrics.total <= tokens
    assert found.trajectory.limits


def test_time_is_kept():
    found, *_ = read(
        writer(block("import time\ntime.sleep(60)")),
        budget=apr.Budget(seconds=1.0),
        limits=SandboxLimits(seconds=100),
    )
    assert found.answer == ""
    assert found.trajectory.wall_s < 3


def test_a_failure_stays_with_its_query():
    def script(request: apr.Request, prompt: str) -> apr.Reply | str:
        if prompt == "<b>":
            return apr.Reply(error=apr.EngineError("broken", 400))
        if "REPL" not in prompt:
            return "yes"
        return "FINAL(ok)" if "REPL output" in prompt else block("print(llm_query_batched(['a', 'b']))")

    found, prompts, _ = read(script)
    assert found.answer == "ok"
    assert "['yes', '(no answer: failed)']" in prompts[-1]


def test_invalid_arguments_and_tasks_are_errors():
    for wrong in ({"depth": -1}, {"iterations": 0}, {"concurrency": 0}):
        with pytest.raises(apr.AprError, match="expected at least"):
            read(writer(""), **wrong)

    class Plain(Task[str]):
        name = "plain"

    engine = apr.ScriptedEngine(writer(""))
    with pytest.raises(Inapplicable, match="plain cannot be answered by a program"):
        asyncio.run(method("recursive")(engine, "?", task=Plain(engine), allow_code=True))


def test_a_question_follows_its_text():
    engine = apr.ScriptedEngine(writer(block("FINAL(context[:5])")))
    task = QuestionTask(engine)
    problem = "Once upon a time.\n\nThey lived.\n\nHow does it begin?"
    found = asyncio.run(method("recursive")(engine, problem, task=task, allow_code=True))
    assert found.answer == "Once"
    prompt = bytes(engine.requests[0].input_ids).decode()
    assert prompt.endswith("Question: How does it begin?\n\n")
    assert task.program("Why?") == ("Why?", "Why?")


@pytest.mark.parametrize(
    "text", ["```repl\n" * 12_000, "FINAL(\n" * 14_000, "FINAL()\n" * 12_000 + "x", "```repl" + " " * 100_000]
)
def test_a_strange_reply_is_read_in_linear_time(text: str):
    began = time.process_time()
    _, rest = split_blocks(text)
    final_call(rest)
    assert time.process_time() - began < 1
