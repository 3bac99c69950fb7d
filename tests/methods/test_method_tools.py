"""Tools in the texts of methods, on a scripted engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.methods import MethodResult, method
from tests.runtime.tools.scripted_tools import AFTER, ChatTokenizer, call, engine, outcomes


async def search(query: str) -> str:
    """Search the library."""
    await asyncio.sleep(0.01)
    return f"found {query}"


def answer(scripted: apr.ScriptedEngine, name: str = "self_consistency", **options: Any) -> MethodResult:
    task = QuestionTask(scripted)
    options = {"tools": [search], "tool_call_parser": "qwen25", "budget": "tokens=6000", **options}
    return asyncio.run(method(name)(scripted, "What is it?", task=task, **options))


def calling(request: apr.Request, prompt: str) -> Any:
    if prompt.endswith(AFTER):
        return apr.Reply("Now I know.\nAnswer: 42")
    if prompt.endswith("Say Yes or No.<|im_end|>\n<|im_start|>assistant\n"):
        return "Yes"
    return "Let me see. " + call("search", query="x")


def test_chains_call_tools_and_vote_on_what_they_wrote_after_the_results():
    scripted = engine(calling, ChatTokenizer())
    result = answer(scripted, n=3)
    t = result.trajectory
    assert result.answer == "42"
    assert outcomes(t) == {"call_1.1_1": "ok", "call_1.2_1": "ok", "call_1.3_1": "ok"}
    assert '"name": "search"' in t.prompt, "the template shows the tools"
    assert t.prompt.endswith("<|im_start|>assistant\n")
    assert t.prompt.count("<|im_start|>user") == 1
    observations = [s for s in t.spans if s.role == "observation"]
    assert [s.path for s in observations] == [(1, 1), (1, 2), (1, 3)]
    for request in t.calls:  # nothing is computed twice
        if request.new_tokens and request.cached_tokens is not None and request.prompt_tokens > 700:
            assert request.cached_tokens >= request.prompt_tokens - request.new_tokens - 1
    assert sum(s.tokens for s in t.reply) <= 6000


def test_a_mask_of_a_method_has_no_calls_of_tools():
    scripted = engine(calling, ChatTokenizer())
    result = answer(scripted, "best_of_n", n=2)
    assert result.answer == "42"
    judged = [r for r in scripted.requests if r.grammar and "Yes" in r.grammar]
    assert judged
    assert not any("query" in (r.grammar or "") for r in judged)


def test_a_model_without_a_chat_template_reads_a_list_of_the_tools():
    def reply(request: apr.Request, prompt: str) -> Any:
        if prompt.endswith("\n</tool_response>\n"):
            return "Answer: 42"
        return call("search", query="x")

    scripted = engine(reply)
    result = answer(scripted, n=2)
    assert result.trajectory.prompt.startswith("You can call these tools:\n- search: Search the library.\n\n")
    assert result.answer == "42"


@pytest.mark.parametrize("tokens", [200, 400, 700, 1000, 2000])
def test_no_budget_is_exceeded(tokens: int):
    scripted = engine(calling, ChatTokenizer())
    result = answer(scripted, n=2, budget={"tokens": tokens, "tool_calls": 1})
    assert sum(s.tokens for s in result.trajectory.reply) <= tokens
    assert len([c for c in result.trajectory.tool_calls if c.outcome == "ok"]) <= 1


def test_what_a_method_cannot_do_with_tools_is_refused():
    for options, message in [
        ({"budget": {"calls": 5}}, "tools in a method need a budget without calls"),
        ({"tool_choice": "required"}, 'expected "auto" or "none"'),
        ({"tools": [apr.Tool("t")]}, "has no function"),
    ]:
        with pytest.raises(apr.AprError, match=message):
            answer(engine(calling, ChatTokenizer()), **options)
