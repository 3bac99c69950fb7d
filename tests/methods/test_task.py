"""A task says by its base classes which methods can solve it."""

from __future__ import annotations

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.lists import ListTask
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.methods.task import (
    CollaborativeTask,
    GraphTask,
    Inapplicable,
    ProgramTask,
    SampledTask,
    SearchTask,
    SelfJudgedTask,
    SkeletonTask,
    Task,
    ValuedSearchTask,
    VotedSearchTask,
    require_family,
)

FAMILIES = {
    SampledTask: "be asked",
    SelfJudgedTask: "judge an answer",
    SkeletonTask: "be answered point by point",
    SearchTask: "be solved step by step",
    ValuedSearchTask: "judge a step",
    VotedSearchTask: "choose among texts",
    GraphTask: "be cut into a graph of operations",
    CollaborativeTask: "be thought about together",
    ProgramTask: "be answered by a program",
}


@pytest.fixture
def engine() -> apr.ScriptedEngine:
    return apr.ScriptedEngine(lambda request, prompt: "")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_task_without_a_family_is_an_error(engine: apr.ScriptedEngine, family: type[Task]):
    with pytest.raises(Inapplicable, match=f"^task cannot {FAMILIES[family]}$"):
        require_family(Task(engine), family)
    task = QuestionTask(engine)
    assert require_family(task, family) is task


def test_a_task_may_support_one_family_only(engine: apr.ScriptedEngine):
    task = ListTask(engine)
    assert [family for family in FAMILIES if isinstance(task, family)] == [GraphTask]


def test_a_search_without_values_is_no_valued_search(engine: apr.ScriptedEngine):
    class Unvalued(SearchTask[str, str]):
        name = "unvalued"

    task = require_family(Unvalued(engine), SearchTask)
    with pytest.raises(Inapplicable, match=r"^unvalued cannot judge a step$"):
        require_family(task, ValuedSearchTask)


def test_an_answer_that_no_task_reads_is_an_error(engine: apr.ScriptedEngine):
    with pytest.raises(Inapplicable, match=r"^task cannot read an answer$"):
        Task(engine).answer("42")
