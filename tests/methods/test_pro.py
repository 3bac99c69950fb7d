"""What `pro` chooses, by the model, the task, the budget, the deadline and the load of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.engine.base import Load
from sgl_apr.methods.pro import Plan, affordable_replies, choose, pro
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import method
from sgl_apr.methods.task import AggregationTask, Inapplicable, SampledTask, SkeletonTask, Task


class Digits(SampledTask[str]):
    """The digit that a reply ends with; 2 is right."""

    name, max_tokens = "digits", 10

    def prompt(self, problem: str) -> Prompt:
        return Prompt(f"{problem}?")

    def answer(self, text: str) -> str:
        return text[-1:] if text[-1:].isdigit() else ""

    def verify(self, problem: str, answer: str) -> bool:
        return answer == "2"


class Verified(Digits):
    verifiable = True


class Open(AggregationTask[str]):
    name, max_tokens, comparable = "open", 10, False
    prompt, answer = Digits.prompt, Digits.answer  # type: ignore[assignment]

    def aggregation_prompt(self, problem: str, replies: Sequence[str]) -> Prompt:
        return Prompt(f"{problem} of {'|'.join(replies)}?")


class Silent(Digits):
    comparable = False


FREE = Load(running=0, waiting=0, used_tokens=0, max_tokens=10_000)


@pytest.mark.parametrize(
    ("kind", "replies", "name", "options"),
    [
        (Digits, 2, "sequential", {}),
        (Digits, 3, "self_consistency", {"n": 3, "stop": "beta"}),
        (Verified, 12, "best_of_n", {"n": 12}),
        (Open, 4, "sequential", {}),
        (Open, 5, "pacore", {"widths": (4,)}),
        (Open, 17, "pacore", {"widths": (16,)}),
        (Open, 40, "pacore", {"widths": (32, 4)}),
        (Silent, 40, "sequential", {}),
    ],
)
def test_the_rule(kind: type[Task[Any]], replies: int, name: str, options: dict[str, Any]):
    plan = choose(kind(apr.ScriptedEngine(lambda *_: "")), replies, "900 tokens")
    assert (plan.method, dict(plan.options)) == (name, options)
    assert plan.reason.startswith(f"{replies} replies fit (900 tokens), ")


@pytest.mark.parametrize(
    ("budget", "load", "expected"),
    [
        ({"tokens": 100_000}, None, (40, "at most 40 replies")),
        ({"tokens": 205}, None, (20, "205 tokens")),
        ({"tokens": 8}, None, (1, "8 tokens")),
        ({"calls": 5}, FREE, (4, "5 calls")),
        ({}, Load(running=3, waiting=0, used_tokens=9_925, max_tokens=10_000), (7, "75 free KV tokens")),
        ({"seconds": 1.0}, Load(0, 0, 0, 10_000, steps=((1, 0.05), (11, 0.15))), (6, "1 seconds")),
        ({"seconds": 0.1}, Load(0, 0, 0, 10_000, steps=((1, 0.05), (11, 0.15))), (1, "0.1 seconds")),
        ({"seconds": 1.0}, FREE, (40, "at most 40 replies")),  # nothing was measured yet
    ],
)
def test_how_many_replies_fit(budget: dict[str, Any], load: Load | None, expected: tuple[int, str]):
    assert affordable_replies(apr.Budget(**{"tokens": 1_000, **budget}), 10, 5, load) == expected


def solve(kind: type[Task[Any]], script: Any, **options: Any) -> Any:
    engine = apr.ScriptedEngine(script, options.pop("tokenizer", None))
    engine.loads = FREE
    result = asyncio.run(pro(engine, "which", task=kind(engine), seed=0, **options))
    assert not engine.active
    assert result.method == "pro"
    return result, engine


def test_a_vote_that_ends_early():
    result, engine = solve(Digits, lambda *_: apr.Reply("so 7", delay=0.001))
    assert result.answer == "7"
    assert result.label.startswith("self_consistency: 40 replies fit (at most 40 replies)")
    assert len(engine.requests) < 20
    assert result.trajectory.dialect == "self_consistency"


def test_other_methods_run_with_its_options():
    replies = iter(["so 1", "so 2", *["so 3"] * 40])
    result, engine = solve(Verified, lambda *_: next(replies), budget={"tokens": 60}, temperature=0.3)
    assert (result.answer, result.score) == ("2", 1.0)
    assert result.label == "best_of_n: 5 replies fit (60 tokens), and the task verifies them"
    assert {request.sampling["temperature"] for request in engine.requests} == {0.3}
    result, engine = solve(Open, lambda *_: "so 7", budget={"tokens": 60})
    assert result.label.startswith("pacore: 5 replies fit")
    assert len(engine.requests) == 5


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (Silent, {"single_temperature": 0.0}, 0.0),
        (Silent, {"single_temperature": 0.0, "temperature": 0.3}, 0.3),
        (Silent, {}, 1.0),
        (Verified, {"single_temperature": 0.0}, 0.7),  # samples must differ
    ],
)
def test_the_temperature_of_a_single_reply(kind: type[Task[Any]], options: dict[str, float], expected: float):
    _, engine = solve(kind, lambda *_: "so 7", **options)
    assert {request.sampling.get("temperature", 1.0) for request in engine.requests} == {expected}


def test_a_model_that_forks_by_itself():
    tokenizer = apr.ByteTokenizer(apr.dialect("npr").tags)
    result, engine = solve(Digits, lambda *_: "so 7", tokenizer=tokenizer, single_temperature=0.0)
    assert {request.sampling["temperature"] for request in engine.requests} == {0.0}
    assert (result.answer, result.trajectory.dialect) == ("7", "npr")
    assert result.label == "npr (joined by text): the model forks by itself"


@pytest.mark.parametrize(
    ("budget", "forks"),
    [
        ({"tokens": 19}, False),
        ({"tokens": 20}, True),
        ({"tokens": 19, "seconds": 60.0}, True),  # forks save time
        ({"tokens": 19, "critical_tokens": 15}, True),
    ],
)
def test_a_model_forks_where_two_attempts_fit_or_time_is_short(budget: dict[str, Any], forks: bool):
    tokenizer = apr.ByteTokenizer(apr.dialect("npr").tags)
    result, _ = solve(Digits, lambda *_: "7", tokenizer=tokenizer, budget=budget)
    assert result.trajectory.dialect == ("npr" if forks else "sequential")
    if not forks:
        assert result.answer == "7"
        assert result.label == "sequential: 19 tokens do not pay for forks, which save time"


def test_an_engine_without_a_load_and_wrong_arguments():
    class Unknown(apr.ScriptedEngine):
        async def load(self) -> Load:
            raise apr.EngineError("no load")

    engine = Unknown(lambda *_: "so 7")
    assert asyncio.run(pro(engine, "which", task=Digits(engine))).answer == "7"
    with pytest.raises(apr.AprError, match="a method has a fixed structure"):
        solve(Digits, lambda *_: "", join="kv")
    with pytest.raises(apr.BudgetExceeded):
        solve(Digits, lambda *_: "", budget={"tokens": 0})

    class Points(SkeletonTask[str]):
        name = "points"

    with pytest.raises(Inapplicable, match="points cannot be asked"):
        solve(Points, lambda *_: "")
    assert method("pro") is pro
    assert Plan("sequential", "why").options == {}
