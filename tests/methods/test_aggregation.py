"""PaCoRe and RSA against the papers: what each round reads, how many replies it has, and what a budget leaves of them."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.task import CountdownTask
from sgl_apr.methods.pacore import HIGH, LOW, pacore
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import Method, MethodResult, method
from sgl_apr.methods.rsa import rsa
from sgl_apr.methods.task import AggregationTask, Inapplicable


class Numbers(AggregationTask[str]):
    """The number that a reply ends with."""

    name, max_tokens = "numbers", 10

    def prompt(self, problem: str) -> Prompt:
        return Prompt(f"{problem}?")

    def aggregation_prompt(self, problem: str, replies: Sequence[str]) -> Prompt:
        return Prompt(f"{problem} of {'|'.join(replies)}?")

    def answer(self, text: str) -> str:
        return "".join(re.findall(r"\d+$", text))


def run(program: Method, script: Callable[[str], Any], **options: Any) -> tuple[MethodResult, list[str]]:
    """The result, and the prompts in the order of their requests."""
    engine = apr.ScriptedEngine(lambda request, prompt: script(prompt))
    result = asyncio.run(program(engine, "sum", task=Numbers(engine), seed=0, **options))
    assert not engine.active
    calls = result.trajectory.calls
    assert all(c.cached_tokens is None or c.cached_tokens >= c.shared_tokens - 1 for c in calls)
    return result, [bytes(request.input_ids).decode() for request in engine.requests]


def numbered() -> Callable[[str], str]:
    turn = itertools.count(1)
    return lambda prompt: f"<think>hm</think> n{next(turn)}"


def test_the_rounds_of_pacore():
    result, prompts = run(pacore, numbered(), widths=[3, 2])
    assert prompts[:3] == ["sum?"] * 3
    assert prompts[3:5] == ["sum of n1|n2|n3?"] * 2  # compacted: without thoughts
    assert prompts[5:] == ["sum of n4|n5?"]
    assert (result.answer, result.label) == ("6", "exact")
    assert [len(block.branches) for block in result.trajectory.blocks] == [3, 2, 1]
    assert result.metrics.critical_path == 3 * len("<think>hm</think> n1")


def test_the_widths_of_the_paper():
    assert (LOW, HIGH) == ((4,), (32, 4))
    _, prompts = run(pacore, numbered())
    assert len(prompts) == 5


def test_replies_of_a_round_run_in_parallel():
    under_way = list[int]()
    engine = apr.ScriptedEngine(
        lambda request, prompt: under_way.append(len(engine.active)) or apr.Reply("n1", delay=0.003)
    )
    asyncio.run(pacore(engine, "sum", task=Numbers(engine), widths=[3, 2]))
    assert under_way == [0, 1, 2, 0, 1, 0]
    under_way.clear()
    asyncio.run(rsa(engine, "sum", task=Numbers(engine), population=3, steps=2))
    assert under_way == [0, 1, 2] * 2


def test_a_last_round_that_fails_or_says_nothing_leaves_the_vote_of_the_round_before():
    def script(prompt: str) -> Any:
        return apr.Reply("n7", error=apr.EngineError("broken", 400)) if " of " in prompt else "n5"

    assert run(pacore, script)[0].answer == "5"
    assert run(pacore, lambda prompt: "" if " of " in prompt else "n5")[0].answer == "5"
    assert run(pacore, lambda prompt: "")[0].answer == ""


def test_the_steps_of_rsa():
    turn = itertools.count(1)
    result, prompts = run(rsa, lambda prompt: f"n{next(turn)}", population=4, subset=2, steps=3)
    assert prompts[:4] == ["sum?"] * 4
    for step in (1, 2):
        for prompt in prompts[4 * step : 4 * step + 4]:
            read = re.findall(r"n(\d+)", prompt)
            assert len(set(read)) == 2
            assert all(4 * (step - 1) < int(n) <= 4 * step for n in read)
    assert len(prompts) == 12
    assert int(result.answer) in range(9, 13)
    assert result.score == 0.25
    assert [len(block.branches) for block in result.trajectory.blocks] == [4, 4, 4]


def test_rsa_draws_the_same_subsets_for_the_same_seed():
    def prompts() -> list[str]:
        turn = itertools.count(1)
        return run(rsa, lambda prompt: f"n{next(turn)}", population=5, steps=3)[1]

    assert prompts() == prompts()


def test_a_reply_of_rsa_that_fails_leaves_the_one_before_it():
    def script(prompt: str) -> Any:
        return apr.Reply("n7", error=apr.EngineError("broken", 400)) if " of " in prompt else "n5"

    result, prompts = run(rsa, script, population=3, steps=2)
    assert (result.answer, result.score, len(prompts)) == ("5", 1.0, 6)


@pytest.mark.parametrize(
    ("tokens", "population", "steps"), [(1600, 16, 10), (400, 8, 5), (40, 2, 2), (10, 1, 1)]
)
def test_a_budget_shrinks_population_and_steps(tokens: int, population: int, steps: int):
    result, prompts = run(rsa, lambda prompt: "n5", budget=apr.Budget(tokens=tokens + len("sum?")))
    assert len(prompts) == population * steps
    assert prompts.count("sum?") == population
    assert result.metrics.total <= tokens + len("sum?")
    assert bool(result.trajectory.limits) == (tokens < 1600)


def test_a_budget_gives_pacore_fewer_replies():
    result, prompts = run(pacore, lambda prompt: "n5", widths=[16], budget=apr.Budget(tokens=60))
    assert prompts.count("sum?") == 5  # 56 tokens by 17 parts
    assert len(prompts) == 6
    assert result.metrics.total <= 60


@pytest.mark.parametrize("widths", ["16", [], [0], [2.5], 4])
def test_wrong_widths(widths: Any):
    with pytest.raises(apr.AprError, match="expected a list of whole numbers from 1"):
        run(pacore, lambda prompt: "", widths=widths)


def test_wrong_options_and_tasks():
    with pytest.raises(apr.AprError, match="subset=0, expected at least 1"):
        run(rsa, lambda prompt: "", subset=0)
    assert (method("pacore"), method("rsa")) == (pacore, rsa)
    tokenizer = apr.ByteTokenizer(("<Child>",))
    engine = apr.ScriptedEngine(lambda *_: "", tokenizer)
    for program in (pacore, rsa):
        with pytest.raises(Inapplicable):
            asyncio.run(program(engine, "sum", task=object.__new__(CountdownTask)))


@pytest.mark.parametrize("program", [pacore, rsa])
def test_replies_that_do_not_fit_the_context_leave_the_vote_before_them(program: Method):
    engine = apr.ScriptedEngine(lambda request, prompt: "n" * 8 + "5")
    engine.context = 30
    options: dict[str, Any] = {"widths": [4]} if program is pacore else {"population": 4, "steps": 2}
    result = asyncio.run(program(engine, "sum", task=Numbers(engine), seed=0, **options))
    assert result.answer == "5"
    assert "context" in {limit.limit for limit in result.trajectory.limits}
    assert max(len(request.input_ids) for request in engine.requests) < 30
    assert max(map(len, engine.commits)) < 30
