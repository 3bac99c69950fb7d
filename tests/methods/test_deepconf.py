"""DeepConf against the paper: the threshold of the warm-up, replies that end early, the vote, and its consensus."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from math import log
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.methods.deepconf import deepconf
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.task import SampledTask
from sgl_apr.trajectory.calls import TokenLogprob, TopLogprobs
from sgl_apr.trajectory.confidence import token_confidence


def top(likely: float) -> TopLogprobs:
    return (TokenLogprob(0, log(likely)), TokenLogprob(1, log(1 - likely)))


class Digits(SampledTask[str]):
    """The digit that a reply ends with."""

    name, max_tokens = "digits", 40

    def prompt(self, problem: str) -> Prompt:
        return Prompt(f"{problem}?")

    def answer(self, text: str) -> str:
        return text[-1:] if text[-1:].isdigit() else ""


def answered(replies: Sequence[apr.Reply], **options: Any) -> tuple[MethodResult, apr.ScriptedEngine]:
    turn = iter(replies)
    engine = apr.ScriptedEngine(lambda request, prompt: next(turn))
    options = {"n": len(replies), "seed": 0, "parallelism": 1, "window": 4, **options}
    result = asyncio.run(deepconf(engine, "which", task=Digits(engine), **options))
    assert not engine.active
    return result, engine


def reply(text: str, likely: float) -> apr.Reply:
    return apr.Reply(text, top_logprobs=top(likely))


def test_an_unsure_reply_ends_when_its_group_is_below_the_threshold():
    warm = [reply("warm-up 1", 0.9), reply("warm-up 2", 0.99), reply("warm-up 2", 0.6)]
    late = [reply("a long reply with 3", 0.7), reply("a long reply with 1", 0.95)]
    result, engine = answered([*warm, *late], warmup=3, keep=0.66)
    branches = [branch for block in result.trajectory.blocks for branch in block.branches]
    assert [branch.outcome for branch in branches] == ["eos", "eos", "eos", "aborted", "eos"]
    assert len(branches[3].text) == 4  # one group
    assert "confidence" in {limit.limit for limit in result.trajectory.limits}
    weights = [token_confidence(top(p)) or 0.0 for p in (0.9, 0.95, 0.99)]
    assert result.answer == "1"  # the reply of 0.6 has no vote
    assert result.score == pytest.approx((weights[0] + weights[1]) / sum(weights))
    assert len(engine.requests) == 5


def test_a_consensus_of_the_warm_up_samples_nothing_more():
    result, engine = answered([reply("warm-up 1", 0.9)] * 4 + [reply("late 2", 0.9)] * 4, warmup=4)
    assert (result.answer, result.score, len(engine.requests)) == ("1", 1.0, 4)


def test_a_consensus_ends_sampling():
    warm = [reply("warm-up 1", 0.9), reply("warm-up 2", 0.9)]
    result, engine = answered([*warm, *[reply("late 1", 0.9)] * 30], warmup=2, keep=1.0, consensus=0.8)
    assert len(engine.requests) == 5  # 4 of 5
    assert (result.answer, result.score) == ("1", pytest.approx(0.8))


def test_keep_sets_the_threshold():
    warm = [reply("warm-up 1", p) for p in (0.9, 0.8, 0.7, 0.99)]
    late = [reply("a long reply 2", 0.85)]
    low, _ = answered([*warm, *late], warmup=4, keep=0.1, consensus=1.0)
    high, _ = answered([*warm[:3], reply("warm-up 2", 0.99), *late], warmup=4, keep=0.9, consensus=1.0)
    assert (low.answer, low.score) == ("1", 1.0)
    weights = [token_confidence(top(p)) or 0.0 for p in (0.9, 0.8, 0.7, 0.99, 0.85)]
    weights.remove(min(weights))  # the tenth percentile is between the two least sure ones
    assert (high.answer, high.score) == ("2", pytest.approx(sum(weights[2:]) / sum(weights)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep=0, expected a share above 0"),
        ({"consensus": 2}, "consensus=2, expected a share"),
        ({"warmup": 0}, "warmup=0, expected at least 1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str):
    with pytest.raises(apr.AprError, match=message):
        answered([reply("x 1", 0.9)], **options)


def test_budgets_and_engines_without_logprobs():
    result, engine = answered([reply("warm-up 1", 0.9)] * 9, warmup=6, budget=apr.Budget(tokens=100))
    assert len(engine.requests) == 2
    assert result.metrics.total <= 100
    result, _ = answered([apr.Reply("x 1"), apr.Reply("x 2"), apr.Reply("x 1")], warmup=3)
    assert result.answer == "1"
    assert method("deepconf") is deepconf
