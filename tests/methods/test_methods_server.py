"""Every method on Countdown with the built-in model on a real server: its requests and its cost."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import sglang as sgl

import sgl_apr as apr
from sgl_apr.cli.eval import SINGLE_REPLY_METHODS
from sgl_apr.cli.main import main
from sgl_apr.evaluation.tasks.countdown.problems import generate_problems, solves
from sgl_apr.evaluation.tasks.countdown.task import CountdownTask
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.methods.registry import METHOD_MODULES, MethodResult, method
from sgl_apr.methods.task import Inapplicable, Task
from sgl_apr.server.launch.launcher import Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

NULL = {
    "skeleton_of_thought": "point by point",
    "recursive": "answered by a program",
    "pacore": "make one reply of several",
    "rsa": "make one reply of several",
}
PATHS = 3  # that a vote can pay for
BUDGET = apr.Budget(tokens=PATHS * CountdownTask.max_tokens)
GIVEN = list(generate_problems(1, "test", seed=0))


def greedy(name: str) -> dict[str, float]:
    """As `sgl-apr eval` asks those that one reply is the answer of."""
    if name == "pro":
        return {"single_temperature": 0.0}
    return {"temperature": 0.0} if name in SINGLE_REPLY_METHODS else {}


@pytest.fixture(scope="module")
def results(solver: Server) -> Mapping[str, list[MethodResult]]:
    """What each method that Countdown has words for makes of a few problems."""

    async def all_of_them() -> dict[str, list[MethodResult]]:
        async with await apr.HttpEngine.connect(solver.url) as engine:
            task = CountdownTask(engine)
            return {
                name: [await method(name)(engine, p, task=task, budget=BUDGET, **greedy(name)) for p in GIVEN]
                for name in METHOD_MODULES
                if name not in NULL
            }

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("name", [name for name in METHOD_MODULES if name not in NULL])
def test_labels_and_metrics_say_what_was_run(results: Mapping[str, list[MethodResult]], name: str):
    """Within its budget, from the cache what the cache has, and an answer that its trajectory holds."""
    for problem, result in zip(GIVEN, results[name], strict=True):
        metrics = result.metrics
        assert result.method == name
        assert metrics.total <= BUDGET.tokens
        assert 0 < metrics.critical_path <= metrics.total
        requests = sum(1 + c.retries + c.continuations for c in result.trajectory.calls)
        assert metrics.engine_calls == requests > 0
        for call in result.trajectory.calls:
            assert call.cached_tokens is None or call.cached_tokens >= call.shared_tokens - 1, call
        assert apr.Trajectory.from_json(result.trajectory.to_json()) == result.trajectory
        if solves(problem, result.answer):
            assert result.answer.rsplit("= ", 1)[-1] == str(problem.target)


def test_some_are_right(results: Mapping[str, list[MethodResult]]):
    right = {
        name: sum(solves(p, r.answer) for p, r in zip(GIVEN, found, strict=True))
        for name, found in results.items()
    }
    assert min(right[name] for name in ("sequential", "self_consistency", "tree_of_thoughts", "apr")) >= 1, (
        right
    )


def test_a_model_that_forks_by_itself(solver: Server):
    """On a problem that is not easy for the model: a call for each branch, and one after each join."""
    problem = next(p for p in generate_problems(9, "test", seed=0) if len(p.numbers) == 4)

    async def asked() -> MethodResult:
        async with await apr.HttpEngine.connect(solver.url) as engine:
            options = {"task": CountdownTask(engine), "budget": apr.Budget(tokens=6000), "temperature": 0.0}
            return await method("apr")(engine, problem, **options)

    result = asyncio.run(asked())
    called = Counter(call.phase for call in result.trajectory.calls)
    assert solves(problem, result.answer)
    assert result.metrics.branches >= 2
    assert called["branch"] == result.metrics.branches
    assert called["trunk"] + called["after"] == 1 + result.metrics.blocks


def test_branches_run_in_parallel(results: Mapping[str, list[MethodResult]]):
    for name in ("self_consistency", "tree_of_thoughts"):
        for result in results[name]:
            spans = sorted((c.started, c.ended) for c in result.trajectory.calls if c.output_tokens)
            assert any(later < ended for (_, ended), (later, _) in pairwise(spans)), name


@pytest.mark.parametrize("name", [name for name in METHOD_MODULES if name not in NULL])
def test_the_number_of_requests(results: Mapping[str, list[MethodResult]], name: str):
    """Branches and calls of each row: those of the papers' structures, where the model has no say."""
    (result,) = results[name]
    called = Counter(call.phase for call in result.trajectory.calls)
    blocks = [(len(block.path), len(block.branches)) for block in result.trajectory.blocks]
    outer, inner = ([width for depth, width in blocks if depth == of] for of in (1, 3))
    assert result.metrics.branches == sum(outer) + sum(inner)
    continuations = sum(call.continuations for call in result.trajectory.calls)
    assert result.metrics.engine_calls == called.total() + continuations
    match name:
        case "sequential":
            assert (outer, inner, called) == ([], [], {"ask": 1})
        case "self_consistency" | "best_of_n":  # the task checks replies: nobody judges them
            assert (outer, inner, called) == ([PATHS], [], {"commit": 1, "branch": PATHS})
            assert result.score in {k / PATHS for k in range(PATHS + 1)}
        case "value_guided":
            assert (outer, inner, called) == ([PATHS], [], {"commit": 1, "branch": PATHS})
        case "deepconf":  # all are its warm-up
            assert (outer, inner, called) == ([PATHS], [], {"commit": 1, "branch": PATHS})
        case "spex":  # as tree_of_thoughts, each state in a block of its own
            assert (set(outer), inner[0]) == ({1}, 3)
            assert set(inner) <= {1, 2, 3}  # fewer where the budget pays for no more
            assert 3 + 3 <= called["branch"] <= sum(inner)
        case "tree_of_thoughts":  # three proposals, three values of each state that they lead to, and so on
            assert (outer[0], inner[0]) == (1, 3)
            assert inner[1 : 1 + outer[1]] == [3] * outer[1]
            assert 3 + outer[1] <= called["branch"] <= sum(inner)  # what the budget cuts is not asked
        case "graph_of_thoughts":  # a proposal, and a search after each step that it names
            assert (outer, inner) == ([1, outer[1]], [1] * (1 + outer[1]))
            assert called == {"branch": 1 + outer[1]}
        case "mcts":  # a proposal, a value of each child, then the leaves that are selected
            assert (outer[0], inner[: 1 + outer[1]]) == (1, [1] * (1 + outer[1]))
            assert 1 + outer[1] <= called["branch"] <= sum(inner)
        case "group_think" | "hogwild":  # one group, whose prompt is committed first
            workers = 4 if name == "group_think" else 2
            assert (outer, inner, called) == ([workers], [], {"commit": 1, "branch": workers})
        case "parathinker":  # all that have written are read again
            assert (outer, inner, called) == ([8], [], {"commit": 9, "branch": 8, "after": 1})
        case "pro":  # the format of the model
            assert (outer, inner, called) == ([], [], {"trunk": 1})
            assert result.label.endswith(": the model forks by itself")
        case _:  # of three numbers, which the model does not fork for
            assert (outer, inner, called) == ([], [], {"trunk": 1})


GROUPS = {"group_think": "groupthink", "hogwild": "hogwild"}


@pytest.mark.parametrize("name", GROUPS)
def test_workers_decode_together(results: Mapping[str, list[MethodResult]], name: str):
    """Every worker's first token saw the prompt and all headers, and each later one what all had written by then."""
    (result,) = results[name]
    assert result.label == f"{GROUPS[name]}-exact"
    trajectory, (block,) = result.trajectory, result.trajectory.blocks
    (group,) = trajectory.groups
    assert (group.path, group.kind) == (block.path, name)
    lengths = [sum(trajectory.spans[i].tokens for i in branch.spans) for branch in block.branches]
    assert result.metrics.critical_path == max(lengths)
    before = trajectory.spans[0].tokens + len(lengths)  # a header of one token each
    bodies = [i for i, span in enumerate(trajectory.spans) if span.role == "body" and span.tokens]
    assert all(trajectory.tokens_seen[i][0] == before for i in bodies)
    if all(n > 3 for n in lengths):
        assert all(trajectory.tokens_seen[i][2] == before + 2 * len(lengths) for i in bodies)


@pytest.mark.parametrize("name", GROUPS)
def test_the_form_by_chunks(solver: Server, name: str):
    """Rounds, in which all that have not ended write."""

    async def run() -> MethodResult:
        async with await apr.HttpEngine.connect(solver.url) as engine:
            return await method(name)(
                engine, GIVEN[0], task=CountdownTask(engine), budget=apr.Budget(tokens=400), exact=False
            )

    result = asyncio.run(run())
    called = Counter(call.phase for call in result.trajectory.calls)
    outer = [len(block.branches) for block in result.trajectory.blocks]
    assert result.label == f"{GROUPS[name]}-chunk(32)"
    assert outer[0] == (4 if name == "group_think" else 2)
    assert outer == sorted(outer, reverse=True)
    assert outer[0] <= called["branch"] <= sum(outer)
    assert called["commit"] <= len(outer)


@pytest.mark.parametrize("name", NULL)
def test_methods_that_countdown_does_not_support(solver: Server, name: str):
    async def asked() -> None:
        async with await apr.HttpEngine.connect(solver.url) as engine:
            await method(name)(engine, GIVEN[0], task=CountdownTask(engine))

    with pytest.raises(Inapplicable, match=NULL[name]):
        asyncio.run(asked())


@pytest.mark.parametrize("name", NULL)
def test_they_run_on_open_questions(server: Server, name: str):
    """A random model says nothing to the point, and every method comes to its end; SmolLM2 does in the slow tests."""

    async def asked() -> MethodResult:
        async with await apr.HttpEngine.connect(server.url) as engine:
            options = {"allow_code": True, "iterations": 2, "reply_tokens": 20} if name == "recursive" else {}
            return await method(name)(
                engine, "What is it?", task=QuestionTask(engine), budget=apr.Budget(tokens=2000), **options
            )

    result = asyncio.run(asked())
    assert (
        result.metrics.engine_calls >= 1
    )  # its tags are long where they are quoted as text, and fill its context
    assert result.metrics.total <= 2000


@pytest.mark.parametrize("name", GROUPS)
def test_a_program_runs_a_group(solver: Server, name: str):
    @sgl.function
    def program(s: Any) -> None:
        s += "Answer:" + apr.solve(
            "answer",
            GIVEN[0],
            method=name,
            task=CountdownTask,
            exact=True,
            seed=0,
            budget=apr.Budget(tokens=300),
        )

    with apr.Endpoint(solver.url) as endpoint:
        state = program.run(backend=endpoint)
        result = state.get_meta_info("answer")["result"]
        assert state["answer"] == result.answer
        assert result.label == f"{GROUPS[name]}-exact"
        assert result.trajectory.groups[0].kind == name
        assert [call.phase for call in result.trajectory.calls].count("commit") == 1


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_a_program_solves(solver: Server):
    @sgl.function
    def program(s: Any) -> None:
        s += "Answer:" + apr.solve(
            "answer", GIVEN[0], method="self_consistency", task=CountdownTask, n=2, seed=0, budget=BUDGET
        )
        s += sgl.gen("rest", max_tokens=4)

    with apr.Endpoint(solver.url) as endpoint:
        state = program.run(backend=endpoint)
        result = state.get_meta_info("answer")["result"]
        assert state["answer"] == result.answer
        assert state.text().startswith(f"Answer:{result.answer}")
        assert result.metrics.branches == 2
        assert result.trajectory == state.get_meta_info("answer")["trajectory"]
        assert state["rest"] is not None
        wrong = sgl.function(lambda s: s.__iadd__(apr.solve("x", "why?", method="mcts", task=Task)))
        failed = wrong.run(backend=endpoint)
        with pytest.raises(Inapplicable, match="step by step"):
            failed["x"]


def test_the_table(solver: Server, capsys: pytest.CaptureFixture[str]):
    names = "sequential,skeleton_of_thought,self_consistency"
    words = [
        "eval",
        "countdown",
        "--url",
        solver.url,
        "--methods",
        names,
        "--limit",
        "1",
        "--budget",
        f"tokens={BUDGET.tokens}",
    ]
    assert main([*words, "--json"]) == 0
    first, second, third = json.loads(capsys.readouterr().out)["rows"]
    assert (second["accuracy"], second["problems"]) == (None, 0)
    assert NULL["skeleton_of_thought"] in second["reason"]
    for row in (first, third):
        assert row["label"] == "exact"
        assert 0 <= row["accuracy"] <= 1
        assert row["one_by_one_s"] > 0
        assert row["alone_s"] > 0
    assert first["engine_calls"] == 1
    assert third["engine_calls"] == PATHS + 1
    assert 0 < third["cached_share"] < 1
    words[words.index(names)] = "skeleton_of_thought"
    assert main(words) == 1, "there is no figure"
    assert "point by point" in capsys.readouterr().out


def test_a_model_that_was_not_trained_on_countdown(server: Server):
    async def asked() -> None:
        async with await apr.HttpEngine.connect(server.url) as engine:
            CountdownTask(engine)

    with pytest.raises(Inapplicable, match="needs a model trained on it"):
        asyncio.run(asked())


def test_no_such_method(capsys: pytest.CaptureFixture[str]):
    assert main(["eval", "countdown", "--url", "http://127.0.0.1:9", "--methods", "guess"]) == 1
    assert "no method 'guess', expected some of all, pro, sequential" in capsys.readouterr().err
