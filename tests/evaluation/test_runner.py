"""Running methods on benchmarks, without a server: what is stored, what is not repeated, why a method cannot run."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.benchmarks.base import Benchmark, Case
from sgl_apr.evaluation.benchmarks.registry import benchmark
from sgl_apr.evaluation.metrics import MethodResults
from sgl_apr.evaluation.runner import evaluate, measure_attempt, run_attempts, time_alone
from sgl_apr.evaluation.store import RUN_FILE, ResultStore, open_evaluation, read_results
from sgl_apr.evaluation.tasks.countdown.problems import Problem
from sgl_apr.evaluation.tasks.countdown.search import sequential_search
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.methods.registry import METHOD_MODULES, MethodResult

ANSWERS = {"One and one?": "2", "Two and two?": "4", "Two and one?": "3"}
SUMS = Benchmark(
    "sums",
    [Case(f"sum {k}", question, k % 2) for k, question in enumerate(ANSWERS)],
    QuestionTask,
    lambda case, answer: answer == ANSWERS[case.problem],
    apr.Budget(tokens=2000),
)


def adds(request: apr.Request, prompt: str) -> str:
    """Answers all but the last problem correctly, each time in other words."""
    question = next((q for q in ANSWERS if q in prompt), "")
    answer = "5" if question == "Two and one?" else ANSWERS.get(question, "")
    return f"Thinking of it {len(prompt)} times.\nAnswer: {answer}"


def ran(
    engine: apr.ScriptedEngine, found: ResultStore, method: str, given: Benchmark = SUMS, **options: Any
) -> MethodResults:
    options = {"budget": given.budget, "temperature": 0.0, **options}
    return asyncio.run(run_attempts(engine, given, method, found, **options))


def test_a_text_task_end_to_end(tmp_path: Path):
    engine = apr.ScriptedEngine(adds)
    with open_evaluation(tmp_path, {"task": "sums"}) as found:
        row = ran(engine, found, "self_consistency", n=4)
    assert [(a.problem, a.size, a.correct) for a in row.attempts] == [
        ("sum 0", 0, True),
        ("sum 1", 1, True),
        ("sum 2", 0, False),
    ]
    assert {a.label for a in row.attempts} == {"exact"}
    assert {(a.forks, a.branches, a.redundancy, a.diversity) for a in row.attempts} == {(1, 4, 1.0, 0.25)}
    _, *lines = map(json.loads, (tmp_path / RUN_FILE).read_text().splitlines())
    assert {line["problem"]: line["answer"] for line in lines} == {"sum 0": "2", "sum 1": "4", "sum 2": "5"}
    for line in lines:
        trajectory = apr.Trajectory.from_json(json.dumps(line["trajectory"]))
        assert len(trajectory.blocks[0].branches) == 4
        assert trajectory.metrics().total == line["tokens"]
    assert read_results(tmp_path)[0].attempts == row.attempts


@pytest.mark.parametrize("killed", ["between lines", "within a line"])
def test_a_killed_run_neither_repeats_nor_loses_attempts(tmp_path: Path, killed: str):
    engine = apr.ScriptedEngine(adds)
    with open_evaluation(tmp_path, {}) as found:
        ran(engine, found, "sequential")
    lines = (tmp_path / RUN_FILE).read_text().splitlines(keepends=True)
    (tmp_path / RUN_FILE).write_text(
        "".join(lines[:3]) + (lines[3][:40] if killed == "within a line" else "")
    )
    again = apr.ScriptedEngine(adds)
    with open_evaluation(tmp_path, {}) as found:
        row = ran(again, found, "sequential")
    assert len(again.requests) == 1
    assert [a.problem for a in row.attempts] == ["sum 0", "sum 1", "sum 2"]
    numbers = [json.loads(line)["number"] for line in (tmp_path / RUN_FILE).read_text().splitlines()[1:]]
    assert sorted(numbers) == [0, 1, 2]


def test_a_dying_engine_keeps_finished_attempts(tmp_path: Path):
    def dies(request: apr.Request, prompt: str) -> apr.Reply:
        failed = apr.EngineError("it is gone") if "Two and one?" in prompt else None
        return apr.Reply(adds(request, prompt), error=failed)

    with open_evaluation(tmp_path, {}) as found, pytest.raises(apr.EngineError, match="gone"):
        ran(apr.ScriptedEngine(dies), found, "sequential", at_once=1, retry=apr.Retry(attempts=1))
    engine = apr.ScriptedEngine(adds)
    with open_evaluation(tmp_path, {}) as found:
        assert sorted(found.attempts["sequential"]) == [(0, 0), (0, 1)]
        assert len(ran(engine, found, "sequential").attempts) == 3
    assert len(engine.requests) == 1


def test_trajectories_are_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = Counter[str]()

    class Seen(apr.Trajectory):
        def __del__(self) -> None:
            made["gone"] += 1

    def seen(*arguments: Any) -> Any:
        result: MethodResult = arguments[3]
        made["made"] += 1
        return measure_attempt(
            *arguments[:3], replace(result, trajectory=Seen(**vars_of(result.trajectory))), *arguments[4:]
        )

    def vars_of(trajectory: apr.Trajectory) -> dict[str, Any]:
        return {name: getattr(trajectory, name) for name in trajectory.__dataclass_fields__}

    monkeypatch.setattr("sgl_apr.evaluation.runner.measure_attempt", seen)
    with open_evaluation(tmp_path, {}) as found:
        row = ran(apr.ScriptedEngine(adds), found, "sequential")
        assert made["made"] == made["gone"] == 3
    assert len(row.attempts) == 3


@pytest.mark.parametrize(
    ("method", "why"),
    [("graph_of_thoughts", ""), ("recursive", "pass allow_code=True"), ("tree_of_thoughts", "")],
)
def test_a_method_that_cannot_run_has_a_reason(method: str, why: str):
    row = ran(apr.ScriptedEngine(adds), ResultStore(), method)
    assert why in row.reason
    assert bool(row.attempts) == (not why)
    figures = row.as_json((64,))
    assert figures["problems"] == (0 if why else 3)
    assert (figures["accuracy"] is None) == bool(why)


def test_an_unsuitable_model_has_a_reason():
    row = ran(apr.ScriptedEngine(adds), ResultStore(), "sequential", benchmark("countdown", 3))
    assert "needs a model trained on it" in row.reason
    row = ran(apr.ScriptedEngine(adds), ResultStore(), "sequential", budget=apr.Budget(tokens=1, width=2))
    assert row.attempts
    assert not any(a.correct for a in row.attempts), "there is no room for an answer"


def test_a_method_whose_package_is_missing_has_a_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "treequest", None)
    row = ran(apr.ScriptedEngine(adds), ResultStore(), "mcts")
    assert not row.attempts
    assert row.reason == "the method mcts needs treequest: pip install 'treequest==0.3.3' (the extra mcts)"


@pytest.mark.parametrize("name", ["countdown", "game24"])
def test_games_solved_by_a_scripted_search(name: str):
    def searched(request: apr.Request, prompt: str) -> str:
        return sequential_search(Problem.parse(prompt), 1 << 20)

    given = benchmark(name, 6)
    engine = apr.ScriptedEngine(searched, apr.ByteTokenizer(apr.dialect("spawn").tags))
    row = ran(engine, ResultStore(), "apr", given, budget=apr.Budget(tokens=1 << 16))
    assert row.accuracy == 1.0
    assert [a.problem for a in row.attempts] == [case.name for case in given.cases]
    assert {a.forks for a in row.attempts} == {0}
    assert {a.redundancy for a in row.attempts} == {a.diversity for a in row.attempts} == {None}


def test_every_method_runs_on_a_text_task_or_has_a_reason():
    for method in METHOD_MODULES:
        row = ran(apr.ScriptedEngine(adds), ResultStore(), method, replace(SUMS, cases=SUMS.cases[:1]))
        assert row.attempts or row.reason, method
        assert bool(row.attempts) == (method != "recursive"), (method, row.reason)


def test_attempts_at_other_problems_are_an_error():
    found = ResultStore()
    ran(apr.ScriptedEngine(adds), found, "sequential")
    other = replace(SUMS, cases=[replace(SUMS.cases[0], name="sum x"), *SUMS.cases[1:]])
    with pytest.raises(apr.AprError, match="has an attempt at 'sum 0', which is not that problem of sums"):
        asyncio.run(evaluate("http://127.0.0.1:9", other, "sequential", found))
    row = asyncio.run(evaluate("http://127.0.0.1:9", SUMS, "sequential", found))
    assert len(row.attempts) == 3, "nobody is asked where all is there"


@pytest.mark.parametrize(("method", "requests"), [("sequential", 2), ("self_consistency", 12)])
def test_replies_of_one_request_are_timed_once(
    monkeypatch: pytest.MonkeyPatch, method: str, requests: int
) -> None:
    engine = apr.ScriptedEngine(adds)

    async def connect(*_: Any, **options: Any) -> Any:
        return nullcontext(engine)

    monkeypatch.setattr(apr.HttpEngine, "connect", connect)
    extra = {"n": 3} if method == "self_consistency" else {}
    own, one_by_one = asyncio.run(time_alone("http://server", SUMS, 2, method, budget=SUMS.budget, **extra))
    assert len(engine.requests) == requests
    assert (own == one_by_one) == (method == "sequential")
