"""Tools under the masks, with replies that are drawn at random from all that they allow, without a server."""

from __future__ import annotations

import asyncio
from functools import cache

import pytest

import sgl_apr as apr
from tests.runtime.tools.checked_tools import CALL_TAGS, DIALECTS, PARSERS, check, plot, search
from tests.support.masked_sampler import Masked, SampledEngine


@cache
def tokenizer(dialect: str) -> Masked:
    return Masked((*apr.dialect(dialect).tags, *CALL_TAGS))


def sample(dialect: str, parser: str, seed: int, tokens: int = 900) -> apr.Trajectory:
    engine = SampledEngine(tokenizer(dialect), seed)
    events: list[apr.Event] = []
    trajectory = asyncio.run(
        apr.areason(
            engine,
            "Q: ",
            dialect,
            tools=[search, plot],
            tool_call_parser=parser,
            tool_choice="required" if seed % 2 else "auto",
            on_event=events.append,
            budget={"tokens": tokens, "width": 3, "tool_calls": 9, "tool_result_tokens": 60},
        )
    )
    assert apr.rebuild(events) == trajectory
    assert sum(s.tokens for s in trajectory.reply) <= tokens
    return trajectory


def all_valid(dialect: str, parser: str, count: int) -> tuple[int, int]:
    trajectories = [sample(dialect, parser, seed) for seed in range(count)]
    calls = sum(check(t, parser) for t in trajectories)
    return calls, sum(bool(c.path) for t in trajectories for c in t.tool_calls)


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_calls_are_valid_and_fit(dialect: str, parser: str):
    calls, of_branches = all_valid(dialect, parser, 3)
    assert calls
    assert of_branches


@pytest.mark.slow
@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_200_of_200_are_valid(dialect: str, parser: str):
    calls, _ = all_valid(dialect, parser, 200)
    print(f"{dialect} {parser}: {calls} calls")
    assert calls > 50


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("tokens", [140, 320])
def test_small_budgets_hold(dialect: str, tokens: int):
    for seed in range(2):
        check(sample(dialect, "qwen25", seed, tokens=tokens), "qwen25")
