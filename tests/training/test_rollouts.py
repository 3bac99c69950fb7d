"""Problems that steps draw, how replies to them are judged, and the credit of branches."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.engine.scripted import ScriptedEngine
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.problems import count_solutions
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.branch_credit import branch_advantages, sequence_advantages
from sgl_apr.training.grpo_config import Rollouts
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.rollouts import ProblemPool, Rollout, sample_rollouts

SHARES = {"countdown:3": 3.0, "countdown:3,unsolvable": 1.0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> HfTokenizer:
    tags = [*apr.dialect("spawn").tags, *apr.dialect("multiverse").tags]
    return HfTokenizer(
        countdown_llama(
            tmp_path_factory.mktemp("begin"), tags, layers=1, hidden=32, dialects=("spawn", "multiverse")
        )
    )


def test_each_task_has_its_share_of_every_step():
    pool = ProblemPool(Rollouts(tasks=SHARES, pool=120, problems=10), heldout=40)
    assert Counter(p.benchmark.name for p in pool.heldout) == {
        "countdown:3": 30,
        "countdown:3,unsolvable": 10,
    }
    counts = [Counter(p.benchmark.name for p in pool.draw(step)) for step in range(40)]
    assert {sum(count.values()) for count in counts} == {10}
    assert {count["countdown:3,unsolvable"] for count in counts} == {2, 3}
    mean = sum(count["countdown:3,unsolvable"] for count in counts) / len(counts)
    assert mean == pytest.approx(2.5, abs=0.3)
    for problem in pool.draw(0):
        assert bool(count_solutions(problem.case.problem)) == ("unsolvable" not in problem.benchmark.name)


def test_no_step_draws_what_is_held_out():
    settings = Rollouts(task="countdown:3", pool=60, problems=40)
    pool = ProblemPool(settings, heldout=20)
    held = {p.case.problem for p in pool.heldout}
    drawn = {p.case.problem for step in range(20) for p in pool.draw(step)}
    assert len(held) == 20
    assert len(drawn) == 40
    assert not held & drawn
    assert {p.split for p in held | drawn} == {"train"}
    again = ProblemPool(settings, heldout=20)
    assert [p.case.name for p in again.heldout] == [p.case.name for p in pool.heldout]
    assert [p.case.name for p in again.draw(3)] == [p.case.name for p in pool.draw(3)]


def test_a_task_with_too_few_problems_is_an_error(tmp_path: Path):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{k} + 1?", "answer": k + 1}) + "\n" for k in range(5)))
    with pytest.raises(
        apr.AprError, match=r"has 1 problems to learn from beside the 4 .* least the 3 of a step"
    ):
        ProblemPool(Rollouts(task=str(path), problems=3), heldout=4)
    assert len(ProblemPool(Rollouts(task=str(path), problems=3), heldout=2).draw(0)) == 3


def test_an_unknown_task_is_an_error():
    with pytest.raises(apr.AprError, match="no task 'coutdown'"):
        ProblemPool(Rollouts(task="coutdown"), heldout=0)


def replies_to(tokenizer: HfTokenizer, name: str, script: str) -> list[Rollout]:
    pool = ProblemPool(Rollouts(task=name, pool=8, problems=2), heldout=0)
    engine = ScriptedEngine(lambda request, prompt: script, tokenizer)
    return asyncio.run(sample_rollouts(engine, pool.draw(0), "spawn", Rollouts(mode="sequential")))


@pytest.mark.parametrize(
    ("name", "script", "correct", "false_claim"),
    [
        ("countdown:3", "?", False, False),
        ("countdown:3", "! 1+ 1= 2", False, True),
        ("countdown:3,unsolvable", "?", True, False),
        ("countdown:3,unsolvable", "! 1+ 1= 2", False, True),
    ],
)
def test_replies_are_judged_by_their_benchmark(
    tokenizer: HfTokenizer, name: str, script: str, correct: bool, false_claim: bool
):
    for reply in replies_to(tokenizer, name, script):
        assert reply.trajectory.spans[0].text == reply.problem.case.problem.text
        assert (reply.correct, reply.is_false_claim) == (correct, false_claim)


def test_a_task_that_cannot_judge_branches_is_an_error(tmp_path: Path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"problem": "1 + 1?", "answer": 2}\n')
    (problem,) = ProblemPool(Rollouts(task=str(path), problems=1), heldout=0).draw(0)
    with pytest.raises(apr.AprError, match="mathematics cannot tell whether a branch found a solution"):
        problem.judge_branches(ScriptedEngine(lambda request, prompt: ""))


@pytest.mark.parametrize("name", ["spawn", "multiverse"])
def test_branch_credit_is_the_success_of_the_branch_or_that_of_the_reply(tokenizer: HfTokenizer, name: str):
    engine = ScriptedEngine(lambda request, prompt: "", tokenizer)
    (problem,) = ProblemPool(Rollouts(task="countdown:4", pool=1, problems=1), heldout=0).draw(0)
    replies = [
        asyncio.run(demonstration(problem.case.problem, tokenizer, seed=s, target_dialect=name))
        for s in range(4)
    ]
    judge = problem.judge_branches(engine)
    (first, *others) = branch_advantages([replies], [judge], "mean")
    rewards = {
        branch.path: float(judge(branch.result or branch.text))
        for block in replies[0].blocks
        for branch in block.branches
    }
    assert {0.0, 1.0} == set(rewards.values())
    assert first.keys() == rewards.keys()
    path = next(p for p, r in rewards.items() if r)
    worse = next(p for p, r in rewards.items() if not r)
    assert first[path] - first[worse] == pytest.approx(1.0)
    every = [value for own in (first, *others) for value in own.values()]
    assert sum(every) == pytest.approx(0.0, abs=1e-9)
    assert sequence_advantages(replies[0], 0.5, "own", first) == {(): 0.5, **first}
    assert set(sequence_advantages(replies[0], 0.5, "group", {}).values()) == {0.5}
    assert sequence_advantages(replies[0], 0.5, "trunk", {})[path] == 0.0
