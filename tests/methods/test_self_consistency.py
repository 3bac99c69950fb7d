"""Votes against the papers: when they end, what each vote counts, and what an early end saves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from math import exp, log
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sgl_apr as apr
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.self_consistency import PARALLELISM, TOP_LOGPROBS, self_consistency
from sgl_apr.methods.task import SampledTask
from sgl_apr.methods.vote_stopping import (
    Ballot,
    beta_posterior,
    cges_posterior,
    dirichlet_posterior,
    settled_probability,
)
from sgl_apr.methods.voting import vote
from sgl_apr.trajectory.calls import TokenLogprob, TopLogprobs
from sgl_apr.trajectory.confidence import GroupConfidence, token_confidence, trace_confidence


class Digits(SampledTask[str]):
    """The digit that a reply ends with."""

    name, max_tokens = "digits", 10

    def prompt(self, problem: str) -> Prompt:
        return Prompt(f"{problem}?")

    def answer(self, text: str) -> str:
        return text[-1:] if text[-1:].isdigit() else ""


def answered(replies: Sequence[Any], **options: Any) -> tuple[MethodResult, apr.ScriptedEngine]:
    """The result for replies in turn, and the engine."""
    turn = iter(replies)
    engine = apr.ScriptedEngine(lambda request, prompt: next(turn))
    options = {"n": len(replies), "seed": 0, **options}
    result = asyncio.run(self_consistency(engine, "which", task=Digits(engine), **options))
    assert not engine.active
    return result, engine


def test_without_a_stop_all_chains_vote():
    result, engine = answered(["a 1", "b 2", "c 2", "none", "d 1"])
    assert (result.answer, result.score) == ("1", 0.4)  # a tie: the earliest
    assert len(engine.requests) == 5
    assert not engine.requests[0].top_logprobs


@pytest.mark.parametrize("stop", ["beta", "dirichlet"])
def test_a_settled_vote_sends_no_more_chains(stop: Any):
    result, engine = answered(["x 7"] * 40, stop=stop, parallelism=1)
    assert len(engine.requests) == 4  # 1 - 1/2^5 is above 0.95, 1 - 1/2^4 is not
    assert (result.answer, result.score, result.metrics.engine_calls) == ("7", 1.0, 5)
    assert {limit.limit for limit in result.trajectory.limits} == {"policy"}


def test_chains_run_in_parallel_and_those_that_run_when_the_vote_ends_are_cut():
    slow = [apr.Reply("x 7", delay=0.001)] * 4 + [apr.Reply("long 3", delay=0.05)] * 36
    result, engine = answered(slow, stop="beta")
    assert PARALLELISM <= len(engine.requests) <= PARALLELISM + 3  # as one of the first ended, another began
    assert result.answer == "7"
    cut = [b for b in result.trajectory.blocks[0].branches if b.finish == "aborted"]
    assert len(cut) == 36
    assert result.score == 1.0  # what was cut has no vote


def test_a_vote_that_is_not_settled_goes_to_the_end():
    result, engine = answered([f"x {k % 2}" for k in range(12)], stop="beta", parallelism=1)
    assert len(engine.requests) == 12
    assert (result.answer, result.score) == ("0", 0.5)


def test_cges_believes_a_reply_as_much_as_it_is_sure():
    sure = apr.Reply("x 7", logprob=log(0.97))
    result, engine = answered([sure] * 20, stop="cges", parallelism=1)
    assert (len(engine.requests), result.answer) == (1, "7")
    unsure = apr.Reply("x 7", logprob=log(0.6))
    _, engine = answered([unsure] * 20, stop="cges", parallelism=1)
    assert len(engine.requests) == 8  # 0.6^8 / (0.6^8 + 0.4^8) = 0.962


def top(*probabilities: float) -> TopLogprobs:
    return tuple(TokenLogprob(k, log(p)) for k, p in enumerate(probabilities))


def test_votes_weighted_by_confidence():
    sure, unsure = top(0.98, 0.01, 0.01), top(0.34, 0.33, 0.33)
    replies = [
        apr.Reply("a 1", top_logprobs=unsure),
        apr.Reply("b 1", top_logprobs=unsure),
        apr.Reply("c 2", top_logprobs=sure),
    ]
    result, engine = answered(replies, weight="confidence")
    assert {request.top_logprobs for request in engine.requests} == {TOP_LOGPROBS}
    low, high = token_confidence(unsure), token_confidence(sure)
    assert low is not None
    assert high is not None
    assert (result.answer, result.score) == ("2", pytest.approx(high / (high + 2 * low)))
    result, _ = answered(replies)
    assert result.answer == "1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "gamma"}, "stop='gamma', expected one of beta, dirichlet, cges"),
        ({"weight": "length"}, "weight='length', expected one of confidence"),
        ({"weight": "confidence", "confidence": "max"}, "confidence='max', expected one of mean"),
        ({"threshold": 1.5}, "threshold=1.5, expected a probability"),
        ({"parallelism": 0}, "parallelism=0, expected at least 1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str):
    with pytest.raises(apr.AprError, match=message):
        answered(["x 1"], **options)


def test_a_failed_chain_has_no_vote():
    failed = apr.Reply("x 9", error=apr.EngineError("broken", 400))
    result, engine = answered([failed] + ["x 7"] * 6, stop="beta", parallelism=1)
    assert (result.answer, len(engine.requests)) == ("7", 5)


votes = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(votes)
def test_posteriors_are_probabilities_and_a_vote_for_the_leader_raises_them(counts: list[int]):
    more = [max(counts) + 1, *sorted(counts)[:-1]]
    for posterior in (beta_posterior, dirichlet_posterior):
        assert 0 <= posterior(counts) <= posterior(more) + 1e-9 <= 1 + 2e-9
    assert dirichlet_posterior(counts) <= beta_posterior(counts) + 1e-6  # more answers can overtake


@pytest.mark.parametrize("counts", [[5, 1], [3, 1, 1, 1], [10, 8, 3], [30, 20]])
def test_posteriors_agree_with_samples(counts: list[int]):
    shares = np.random.default_rng(0).dirichlet(np.array(counts) + 1, 200_000)
    assert dirichlet_posterior(counts) == pytest.approx(float((shares.argmax(1) == 0).mean()), abs=0.005)
    first, second = sorted(counts, reverse=True)[:2]
    beta = np.random.default_rng(1).beta(first + 1, second + 1, 200_000)
    assert beta_posterior(counts) == pytest.approx(float((beta > 0.5).mean()), abs=0.005)


def test_the_posterior_of_cges_by_hand():
    found = cges_posterior([Ballot("a", 0.8), Ballot("a", 0.7), Ballot("b", 0.6)])
    likely = {"a": 0.8 * 0.7 * 0.2, "b": 0.1 * 0.15 * 0.6, None: 0.1 * 0.15 * 0.2}
    assert found == {key: pytest.approx(value / sum(likely.values())) for key, value in likely.items() if key}
    assert settled_probability("cges", []) == 0
    assert settled_probability("cges", [Ballot("a", 1.0)] * 3 + [Ballot("b", 0.0)]) > 0.99  # no infinity


def test_a_vote_by_weights():
    engine = apr.ScriptedEngine(lambda *_: "")
    assert vote(Digits(engine), ["1", "2", "", "2"], [3.0, 1.0, 1.0, 1.0]) == ("1", 0.5)
    assert vote(Digits(engine), ["1", "2"], [0.0, 0.0])[0] == "1"
    assert vote(Digits(engine), ["", ""]) == ("", 0.0)


def test_confidences_by_hand():
    assert token_confidence(top(1.0)) is None
    assert token_confidence(top(0.5, 0.25)) == pytest.approx(-(log(0.5) + log(0.25)) / 2)
    values = [4.0, 1.0, 1.0, 4.0, 6.0]
    assert trace_confidence(values, "mean") == pytest.approx(3.2)
    assert trace_confidence(values, "lowest_group", 2) == 1.0
    assert trace_confidence(values, "bottom_10", 2) == 1.0
    assert trace_confidence(values, "tail", 2) == 5.0
    assert trace_confidence(values, "lowest_group", 99) == pytest.approx(3.2)
    assert trace_confidence([]) is None
    group = GroupConfidence(2)
    assert group.add([top(exp(-4), exp(-4))]) is None
    assert group.add([top(1.0), top(exp(-1), exp(-1))]) == pytest.approx(2.5)
    assert group.add([top(exp(-9), exp(-9))]) == pytest.approx(2.5)
