"""Lists as a graph of operations, and the example: halves in parallel, the best merge, counted errors."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
import sys
from collections.abc import Callable
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.lists import ListProblem, ListTask, generate_problems
from sgl_apr.methods.graph_of_thoughts import graph_of_thoughts
from tests.support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "got_sorting.py"
SORT, INTERSECT = ListProblem((3, 1, 2, 0, 3, 9)), ListProblem((3, 1, 2, 7, 8, 9), (9, 1, 7, 4))


def lists(prompt: str) -> list[list[int]]:
    said = re.findall(r"\[([\d, ]*)\]", prompt)
    return [[int(n) for n in text.split(", ") if n] for text in said]


def right(request: apr.Request, prompt: str) -> str:
    """A model that makes no errors."""
    *given, _ = lists(prompt)  # the last is the example of a list
    if prompt.startswith("Which"):
        return f"{[n for n in given[0] if n in given[1]]}"[1:]
    return f"{sorted(n for one in given[: 1 if prompt.startswith('Sort') else 2] for n in one)}"[1:]


def solve(problem: ListProblem, script: Callable[..., Any], **options: Any):
    engine = apr.ScriptedEngine(script)
    task = ListTask(engine)
    found = asyncio.run(graph_of_thoughts(engine, problem, task=task, **options))
    return found, task.verify(problem, found.answer), [bytes(r.input_ids).decode() for r in engine.requests]


@pytest.mark.parametrize(
    ("problem", "said", "errors"),
    [
        (SORT, (0, 1, 2, 3, 3, 9), 0), (SORT, (0, 1, 3, 2, 3, 9), 1), (SORT, (0, 1, 2, 3, 9), 1), (SORT, (), 6),
        (SORT, (0, 1, 2, 3, 3, 9, 9), 1), (INTERSECT, (1, 7, 9), 0), (INTERSECT, (9, 7, 1), 0), (INTERSECT, (1, 2, 7), 2),
    ],
)  # fmt: skip
def test_errors_are_counted(problem: ListProblem, said: tuple[int, ...], errors: int):
    assert problem.count_errors(said) == errors


@pytest.mark.parametrize(
    ("problem", "answer"), [(SORT, [0, 1, 2, 3, 3, 9]), (INTERSECT, [1, 7, 9])], ids=["sort", "intersect"]
)
def test_halves_are_solved_and_merged(problem: ListProblem, answer: list[int]):
    found, verified, asked = solve(problem, right)
    assert (json.loads(found.answer), found.score, verified) == (answer, 0.0, True)
    begins = ("Sort", "Which")
    halves = [lists(prompt)[0] for prompt in asked if prompt.startswith(begins)]
    assert sorted(halves) == sorted([list(problem.numbers[:3])] * 5 + [list(problem.numbers[3:])] * 5)
    assert len(asked) == 15  # and five merges, the best of which needs no mending


def test_the_best_answer_continues_and_errors_are_corrected():
    tries = iter(["9]", "1, 2, 3]", "3]", "", "4]"])

    def script(request: apr.Request, prompt: str) -> str:
        if "[3, 1, 2]\n" in prompt:
            return next(tries)
        if "This is not right: [1, 2, 3]" in prompt:
            return "0, 1, 2, 3, 3, 9]"
        return "1, 2, 3]" if prompt.startswith("Merge") else right(request, prompt)

    _, verified, asked = solve(SORT, script)
    assert sum("Merge these into one sorted list: [1, 2, 3], [0, 3, 9]" in prompt for prompt in asked) == 5
    assert len(asked) == 16
    assert verified


def test_a_wrong_model_is_not_verified():
    found, verified, _ = solve(SORT, lambda request, prompt: "1, 2]")
    assert (found.answer, verified) == ("[1, 2]", False)
    assert SORT.count_errors(json.loads(found.answer)) == 4


@pytest.mark.parametrize("kind", ["sort", "intersect"])
def test_a_seed_reproduces_problems(kind: Any):
    assert (
        list(generate_problems(kind, 3, size=6))
        == list(generate_problems(kind, 3, size=6))
        != list(generate_problems(kind, 3, size=6, seed=1))
    )
    assert all(
        len(p.numbers) == 6 and (p.others is None) == (kind == "sort")
        for p in generate_problems(kind, 3, size=6)
    )


@pytest.mark.parametrize(("script", "solved"), [(right, 4), (lambda request, prompt: "1]", 0)])
def test_the_example_prints_how_many_were_correct(
    script: Callable[..., Any],
    solved: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    class Served(apr.ScriptedEngine):
        @classmethod
        async def connect(cls, url: str) -> Served:
            return cls(script)

        async def __aenter__(self) -> Served:
            return self

        async def __aexit__(self, *error: object) -> None:
            assert not self.active

    monkeypatch.syspath_prepend(str(EXAMPLES))  # as for a script
    monkeypatch.setattr(apr, "HttpEngine", Served)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--url", "http://there", "--size", "6"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["ok"], figures["lists"], figures["right"]) == (solved == 4, 4, solved)
    assert (figures["errors"] == 0) == (solved == 4)
    assert figures["critical_path"] < figures["total_tokens"]
