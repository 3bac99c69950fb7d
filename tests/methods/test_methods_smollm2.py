"""The methods that Countdown does not support, on a language model that follows instructions a little."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.methods import MethodResult, method
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import smollm2

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(900)]

NOTES = "The red box holds 3 balls.\nThe blue box holds 5 balls.\n" * 40


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = Path(tmp_path_factory.mktemp("smol")) / "log"
    with Server(smollm2(), log_path=log, max_total_tokens=16384) as server:
        yield server


def solved(server: Server, name: str, question: str, **options: Any) -> MethodResult:
    async def once() -> MethodResult:
        async with await apr.HttpEngine.connect(server.url) as engine:
            return await method(name)(engine, question, task=QuestionTask(engine), **options)

    result = asyncio.run(once())
    assert result.metrics.total <= options["budget"].tokens
    for call in result.trajectory.calls:
        assert call.cached_tokens is None or call.cached_tokens >= call.shared_tokens - 1, call
    return result


@pytest.mark.parametrize("mode", ["prompt", "fork"])
def test_skeleton_of_thought(smol: Server, mode: str):
    budget = apr.Budget(tokens=1500, branch_tokens=60)
    result = solved(smol, "skeleton_of_thought", "Why do people keep dogs?", mode=mode, budget=budget)
    (block,) = result.trajectory.blocks
    assert 3 <= len(block.branches) <= 10
    assert all(f"{k}. " in result.answer for k in range(1, len(block.branches) + 1))
    assert result.metrics.critical_path < result.metrics.total
    assert result.metrics.engine_calls == 2 + len(block.branches)


def test_recursive(smol: Server):
    """A model of this size writes few programs that run; what it writes runs in the sandbox, and it comes to an end."""
    budget = apr.Budget(tokens=1500)
    question = f"{NOTES}\n\nHow many balls does the red box hold?"
    result = solved(
        smol,
        "recursive",
        question,
        allow_code=True,
        iterations=3,
        reply_tokens=150,
        budget=budget,
        temperature=0.0,
    )
    assert result.metrics.engine_calls >= 1
    assert result.answer


@pytest.mark.parametrize("name", ["group_think", "hogwild"])
def test_workers_that_share_a_cache(smol: Server, name: str):
    """Each worker opens with its name, and the model writes English while it sees the others."""
    budget = apr.Budget(tokens=600, branch_tokens=120)
    result = solved(smol, name, "Name three animals that live in the sea.", budget=budget, exact=True, seed=3)
    (block,) = result.trajectory.blocks
    headers = [span.text for span in result.trajectory.spans if span.role == "header"]
    names = ["Alice", "Bob", "Carol", "Dave"][: len(block.branches)]
    assert headers == [f"**{own}{' [1]' if name == 'hogwild' else ''}:** " for own in names]
    assert result.label.endswith("-exact")
    assert all(len(branch.text.split()) > 5 for branch in block.branches)
    assert result.answer
    assert result.metrics.mean_context > sum(span.tokens for span in result.trajectory.spans[:1])


def test_a_program_solves(smol: Server):
    import sglang as sgl

    @sgl.function
    def program(s: Any, question: str) -> None:
        s += "Q: " + question + "\nA: "
        s += apr.solve(
            "answer",
            question,
            method="self_consistency",
            task=QuestionTask,
            n=3,
            budget=apr.Budget(tokens=300),
        )
        s += "\nIn short: " + sgl.gen("short", max_tokens=8)

    with apr.Endpoint(smol.url) as endpoint:
        state = program.run(question="What is the capital of France?", backend=endpoint)
        found = state.get_meta_info("answer")
        assert found["result"].answer == state["answer"]
        assert f"A: {state['answer']}\nIn short: " in state.text()
        assert len(found["trajectory"].blocks[0].branches) == found["result"].metrics.branches > 0
        assert state["short"]
