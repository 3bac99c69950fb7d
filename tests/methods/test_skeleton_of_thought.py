"""Skeleton-of-Thought against the paper: a skeleton, then all points in parallel, concatenated."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.skeleton_of_thought import skeleton_of_thought
from sgl_apr.methods.task import Inapplicable, SkeletonTask, Task


class Letters(SkeletonTask[str]):
    """A skeleton is letters."""

    name = "letters"

    def answer(self, text: str) -> str:
        return text

    def skeleton_prompt(self, problem: str) -> Prompt:
        return Prompt(f"outline {problem}: ")

    def points(self, text: str) -> Sequence[str]:
        return text.split()

    def point_prompt(self, problem: str, skeleton: str | None, number: int, point: str) -> Prompt:
        shown = "; " if skeleton is None else f"{problem} in {skeleton}, "
        return Prompt(f"{shown}point {number}. {point}", name=point)


def script(request: apr.Request, prompt: str) -> Any:
    return "a b c" if prompt.startswith("outline") and "point" not in prompt else f"={prompt[-1]}!\n"


def written(say: Any = script, **options: Any) -> tuple[MethodResult, apr.ScriptedEngine]:
    engine = apr.ScriptedEngine(say)
    found = asyncio.run(skeleton_of_thought(engine, "X", task=Letters(engine), seed=0, **options))
    assert not engine.active
    return found, engine


def asked(engine: apr.ScriptedEngine) -> list[str]:
    return [bytes(r.input_ids).decode() for r in engine.requests]


def test_the_papers_prompts_see_the_skeleton_and_no_other_point():
    found, engine = written()
    assert (found.label, found.score) == ("exact", None)
    assert found.answer == "1. a=a!\n2. b=b!\n3. c=c!"
    assert asked(engine) == [
        "outline X: ",
        *(f"X in a b c, point {k}. {p}" for k, p in [(1, "a"), (2, "b"), (3, "c")]),
    ]
    assert engine.commits == [tuple(b"X in a b c, point ")]
    assert {r.sampling["temperature"] for r in engine.requests} == {0.0}


def test_a_fork_sees_the_skeleton_as_it_was_written():
    found, engine = written(mode="fork")
    assert (found.label, found.answer) == ("fork-of-skeleton", "1. a=a!\n2. b=b!\n3. c=c!")
    assert asked(engine)[1:] == [
        f"outline X: a b c; point {k}. {p}" for k, p in [(1, "a"), (2, "b"), (3, "c")]
    ]
    assert engine.commits == [tuple(b"outline X: a b c; point ")]
    calls = [c for c in found.trajectory.calls if c.cached_tokens is not None]
    assert all(c.cached_tokens >= c.shared_tokens - 1 for c in calls)


@pytest.mark.parametrize("mode", ["prompt", "fork"])
def test_points_are_written_in_parallel_after_the_skeleton(mode: Any):
    under_way = list[int]()

    def slow(request: apr.Request, prompt: str) -> Any:
        under_way.append(len(engine.active))
        return apr.Reply(script(request, prompt), delay=0.005)

    engine = apr.ScriptedEngine(slow)
    found = asyncio.run(skeleton_of_thought(engine, "X", task=Letters(engine), mode=mode))
    assert under_way == [0, 0, 1, 2]
    one = "X in a b c, point 1. a=a!\n" if mode == "prompt" else "; point 1. a=a!\n"
    assert found.metrics.critical_path == len("a b c") + len(one)
    assert [b.outline for b in found.trajectory.blocks[-1].branches] == ["a", "b", "c"]


@pytest.mark.parametrize("mode", ["prompt", "fork"])
def test_a_width_limits_the_points_written_in_parallel(mode: Any):
    under_way = list[int]()

    def slow(request: apr.Request, prompt: str) -> Any:
        under_way.append(len(engine.active))
        return apr.Reply(script(request, prompt), delay=0.005)

    engine = apr.ScriptedEngine(slow)
    budget = apr.Budget(width=2)
    found = asyncio.run(skeleton_of_thought(engine, "X", task=Letters(engine), mode=mode, budget=budget))
    assert under_way == [0, 0, 1, 0]
    assert found.answer == "1. a=a!\n2. b=b!\n3. c=c!"


def test_at_most_ten_points():
    found, engine = written(lambda r, prompt: "a b c d e f g h i j k l" if prompt.endswith(": ") else "")
    assert len(engine.requests) == 11
    assert found.answer.splitlines()[-1] == "10. j"


def test_a_reply_without_points_is_the_answer():
    found, engine = written(lambda request, prompt: "  ")
    assert (found.answer, len(engine.requests)) == ("  ", 1)


def test_a_point_that_fails_leaves_its_heading():
    def broken(request: apr.Request, prompt: str) -> Any:
        said = script(request, prompt)
        return apr.Reply(said, error=apr.EngineError("broken", 400)) if prompt.endswith("b") else said

    found, _ = written(broken)
    assert found.answer == "1. a=a!\n2. b\n3. c=c!"
    with pytest.raises(apr.EngineError, match="broken"):
        written(broken, on_branch_failure="raise")


@pytest.mark.parametrize("tokens", [1, 5, 30, 50, 90])
@pytest.mark.parametrize("mode", ["prompt", "fork"])
def test_a_budget_is_kept(tokens: int, mode: Any):
    found, _ = written(mode=mode, budget=apr.Budget(tokens=tokens))
    assert found.metrics.total <= tokens
    assert "tokens" in {limit.limit for limit in found.trajectory.limits} or tokens == 90


def test_invalid_arguments_and_tasks_are_errors():
    with pytest.raises(apr.AprError, match=r'mode=.both., expected "prompt" or "fork"'):
        written(mode="both")
    engine = apr.ScriptedEngine(script)
    with pytest.raises(Inapplicable, match="task cannot be answered point by point"):
        asyncio.run(method("skeleton_of_thought")(engine, "X", task=Task[str](engine)))
