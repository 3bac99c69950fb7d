"""Branches that share tokens on a real server with a trained model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.attempts import Attempt, attempt_problems
from sgl_apr.evaluation.tasks.countdown.problems import generate_problems
from sgl_apr.server.launch.launcher import Server

TOKENS = 700


def attempts(url: str, count: int, *, shared: bool, tokens: int = TOKENS) -> Sequence[Attempt]:
    async def run() -> Sequence[Attempt]:
        async with await apr.HttpEngine.connect(url) as engine:
            assert engine.resumes_grammar
            engine.resumes_grammar = shared
            problems = list(islice(generate_problems(count, "train", seed=3), count))
            return await attempt_problems(
                engine, problems, None, budget=apr.Budget(tokens=tokens), temperature=0.0
            )

    return asyncio.run(run())


def cut_branches(found: Sequence[Attempt]) -> int:
    return sum(b.outcome == "length" for a in found for block in a.trajectory.blocks for b in block.branches)


@pytest.mark.server
@pytest.mark.slow
def test_fewer_branches_are_cut_and_nothing_is_exceeded(solver: Server):
    shared, equal = (attempts(solver.url, 4, shared=one) for one in (True, False))
    for attempt in shared:
        assert attempt.trajectory.tokens_shared
        assert attempt.trajectory.metrics().total <= TOKENS
        apr.dialect(attempt.trajectory.dialect).validate(attempt.trajectory.text)
    assert not any(attempt.trajectory.tokens_shared for attempt in equal)
    assert any(call.continuations for attempt in shared for call in attempt.trajectory.calls)
    assert cut_branches(shared) < cut_branches(equal)


@pytest.mark.slow
@pytest.mark.server
def test_two_greedy_runs_of_one_batch_are_the_same(solver: Server):
    first, second = (attempts(solver.url, 40, shared=True) for _ in range(2))
    assert [a.trajectory.text for a in first] == [a.trajectory.text for a in second]
    assert any(call.continuations for attempt in first for call in attempt.trajectory.calls)
