"""Replies that a scorer ends: tournaments, thresholds, where their tokens go, and scorers that are hostile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from math import log
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.task import SampledTask
from sgl_apr.methods.value_guided import value_guided
from sgl_apr.trajectory.calls import TokenLogprob


class Digits(SampledTask[str]):
    """The digit that a reply ends with."""

    name, max_tokens = "digits", 60

    def prompt(self, problem: str) -> Prompt:
        return Prompt(f"{problem}?")

    def answer(self, text: str) -> str:
        return text[-1:] if text[-1:].isdigit() else ""


def reply(quality: int, **options: Any) -> apr.Reply:
    """Three thoughts of that quality, and it as the answer."""
    return apr.Reply("\n".join([f"q{quality}"] * 3) + f"\nso {quality}", **{"delay": 0.004, **options})


def quality(problem: str, text: str) -> float:
    return float(text[1])


def answered(replies: list[Any], **options: Any) -> tuple[MethodResult, list[Any]]:
    """The result, and the outcomes of the replies in their order."""
    turn = iter(replies)

    def script(request: apr.Request, prompt: str) -> Any:
        written = (
            bytes(request.input_ids[-request.resumed_tokens :]).decode() if request.resumed_tokens else ""
        )
        return next(r for r in replies if r.text.startswith(written)) if written else next(turn)

    engine = apr.ScriptedEngine(script)
    options = {"n": len(replies), "seed": 0, "scorer": quality, **options}
    result = asyncio.run(value_guided(engine, "which", task=Digits(engine), **options))
    assert not engine.active
    return result, [branch.outcome for branch in result.trajectory.blocks[0].branches]


def test_each_border_is_a_tournament():
    result, outcomes = answered([reply(k) for k in (3, 7, 1, 5)])
    assert (result.answer, result.score) == ("7", 7.0)
    assert outcomes == ["aborted", "eos", "aborted", "aborted"]
    texts = [branch.text for branch in result.trajectory.blocks[0].branches]
    assert texts[0].count("\n") == texts[2].count("\n") == 1  # half of four end at the first border
    assert texts[3].count("\n") == 2  # and half of two at the second
    assert {limit.limit for limit in result.trajectory.limits} == {"value"}


def test_a_threshold_asks_for_no_comparison():
    result, outcomes = answered([reply(k) for k in (3, 7, 1)], threshold=2.0)
    assert outcomes == ["eos", "eos", "aborted"]
    assert result.answer == "7"
    _, outcomes = answered([reply(k) for k in (1, 0, 1)], threshold=2.0)
    assert outcomes.count("aborted") == 2  # the last one goes on


def test_a_reply_that_has_ended_is_not_waited_for():
    short = apr.Reply("q2 so 2", delay=0.0)
    result, outcomes = answered([short, reply(4), reply(6)])
    assert (result.answer, outcomes) == ("6", ["eos", "aborted", "eos"])


def test_the_strong_get_the_tokens_of_the_weak():
    long = [apr.Reply(f"q{k}\n" + "." * 70 + f" {k}", delay=0.004) for k in (2, 8)]
    result, outcomes = answered(long, budget=apr.Budget(tokens=120 + len("which?")))
    assert (result.answer, outcomes) == ("8", ["aborted", "eos"])
    assert result.metrics.total <= 126


def test_the_model_judges_itself_by_its_confidence():
    def sure(likely: float) -> Any:
        return (TokenLogprob(0, log(likely)), TokenLogprob(1, log(1 - likely)))

    replies = [reply(1, top_logprobs=sure(0.6)), reply(2, top_logprobs=sure(0.99))]
    result, outcomes = answered(replies, scorer="confidence")
    assert (result.answer, outcomes) == ("2", ["aborted", "eos"])


def slow(problem: str, text: str) -> float:
    time.sleep(0.4)
    return 1.0


def broken(problem: str, text: str) -> float:
    raise RuntimeError("broken")


async def gone(problem: str, text: str) -> float:
    raise apr.EngineError("gone")


@pytest.mark.parametrize(
    "scorer",
    [
        broken,
        gone,
        slow,
        lambda p, t: float("nan"),
        lambda p, t: float("inf"),
        lambda p, t: "good",
        lambda: 1.0,
    ],
)
def test_a_hostile_scorer_costs_no_answer(scorer: Callable[..., Any]):
    began = time.monotonic()
    result, outcomes = answered([reply(k) for k in (3, 7)], scorer=scorer, timeout=0.05)
    assert outcomes == ["eos", "eos"]
    assert result.answer in ("3", "7")
    assert result.score is None
    assert time.monotonic() - began < 5


def test_failures_and_wrong_options():
    failed = apr.Reply("q9\n", error=apr.EngineError("broken", 400))
    result, outcomes = answered([failed, reply(4)])
    assert (result.answer, outcomes[0]) == ("4", "failed")
    with pytest.raises(apr.EngineError, match="broken"):
        answered([failed, reply(4)], on_branch_failure="raise")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"n": 0}, "n=0"), ({"keep": 0}, "keep=0"), ({"border": ""}, "border=''"),
        ({"scorer": "value"}, "scorer='value'"), ({"timeout": 0}, "timeout=0"),
    ]  # fmt: skip
    for options, message in wrong:
        with pytest.raises(apr.AprError, match=message):
            answered([reply(1)], **options)
    assert method("value_guided") is value_guided
