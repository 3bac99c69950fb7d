"""Demonstrations of the symbolic search in every format that it is written in: well formed, right, and as the style says."""

from __future__ import annotations

import asyncio

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.attempts import Attempt
from sgl_apr.evaluation.tasks.countdown.branch_experts import TAUGHT
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.expert import SearchStyle
from sgl_apr.evaluation.tasks.countdown.problems import (
    Problem,
    count_solutions,
    generate_problems,
    legal_steps,
    numbers_after,
    solves,
)
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.training_tree import build_training_tree

STYLE = SearchStyle(window=2048, forks={4: 1.0}, width=(2, 5), revisit_rate=1.0)
SHARED = ("threadweaver", "multiverse", "npr")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    tags = dict.fromkeys(tag for name in TAUGHT for tag in apr.dialect(name).tags)
    return HfTokenizer(countdown_llama(tmp_path_factory.mktemp("all"), list(tags), layers=1, hidden=32))


def made(name: str, problem: Problem, tokenizer: HfTokenizer, seed: int = 1, **options) -> apr.Trajectory:
    options.setdefault("style", STYLE)
    return asyncio.run(demonstration(problem, tokenizer, seed=seed, target_dialect=name, **options))


@pytest.mark.parametrize("name", TAUGHT)
def test_replies_are_valid_and_claims_are_right(name: str, tokenizer: HfTokenizer):
    solved, most = 0, 0
    for problem in generate_problems(12, "train", numbers=(4,)):
        trajectory = made(name, problem, tokenizer)
        apr.dialect(name).validate(trajectory.text)
        claim = trajectory.answer.rstrip().rpartition("\n")[2]
        attempt = Attempt(problem, trajectory)
        assert claim.endswith("?") or attempt.correct
        solved += attempt.correct
        most = max(most, *(len(block.branches) for block in trajectory.blocks))
        assert trajectory.metrics().longest_context <= STYLE.window
        ends = [
            b.result if name == "spawn" else b.text for block in trajectory.blocks for b in block.branches
        ]
        assert all("!" in text or "?" in text for text in ends)
        tree = build_training_tree([trajectory], join="kv" if "kv" in apr.dialect(name).joins else None)
        assert len(tree.targets) > 50
    assert solved >= 6
    assert 2 < most <= STYLE.width[1]


@pytest.mark.parametrize("name", TAUGHT)
def test_where_there_is_no_solution_none_is_claimed(name: str, tokenizer: HfTokenizer):
    for problem in generate_problems(4, "train", numbers=(4,), solvable=False):
        assert count_solutions(problem) == 0
        trajectory = made(name, problem, tokenizer)
        assert trajectory.answer.rstrip().endswith("?")
        assert "!" not in trajectory.text


@pytest.mark.parametrize("name", SHARED)
def test_a_branch_searches_behind_its_outline(name: str, tokenizer: HfTokenizer):
    problem = next(generate_problems(1, "train", numbers=(4,)))
    trajectory = made(name, problem, tokenizer)
    steps = {step.text: step for step in legal_steps(problem.numbers)}
    seen = [branch.outline.rstrip() for block in trajectory.blocks for branch in block.branches]
    assert len(seen) == len(set(seen)) > 1, "no first step is tried twice"
    for block in trajectory.blocks:
        for branch in block.branches:
            step = steps[" " + branch.outline.strip()]
            left = Problem(numbers_after(problem.numbers, step), problem.target)
            assert branch.text.startswith(f">{step.text};{left.text}\n")
            found = branch.text.partition("!")[2].partition("<")[0]
            assert bool(count_solutions(left)) == bool(found)
            assert not found or solves(problem, found)


def test_paths_without_outlines_divide_or_draw_the_first_steps(tokenizer: HfTokenizer):
    problem = next(generate_problems(1, "train", numbers=(4,), solvable=False))
    first = legal_steps(problem.numbers)
    numbered = made("parathinker", problem, tokenizer)
    starts = [branch.text.partition(";")[0] for branch in numbered.blocks[0].branches]
    assert starts == [f">{step.text}" for step in first[: len(starts)]]
    drawn = [made("parallel_r1", problem, tokenizer, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0].text == drawn[1].text != drawn[2].text


@pytest.mark.parametrize("name", [*SHARED, "spawn"])
def test_all_forks_have_the_stated_width(name: str, tokenizer: HfTokenizer):
    for problem in generate_problems(6, "train", numbers=(4,)):
        trajectory = made(name, problem, tokenizer, state_width=True)
        stated = int(trajectory.prompt.rpartition("; ")[2])
        assert len(trajectory.blocks[0].branches) == stated
        assert all(len(block.branches) <= stated for block in trajectory.blocks)


@pytest.mark.parametrize("name", ["multiverse", "spawn"])
def test_branches_fork_again_where_problems_are_large(name: str, tokenizer: HfTokenizer):
    style = SearchStyle(
        window=2048, forks={4: 1.0, 5: 1.0}, width=(2, 3), hint_rate=1.0, depth=2, revisit_rate=1.0
    )
    solved = 0
    for problem in generate_problems(6, "train", numbers=(5,)):
        trajectory = made(name, problem, tokenizer, style=style)
        apr.dialect(name).validate(trajectory.text)
        solved += Attempt(problem, trajectory).correct
        inner = [block for block in trajectory.blocks if block.path[:-1]]
        assert len(inner) >= len(trajectory.blocks[0].branches), "every branch forks"
        assert max(len(span.path) for span in trajectory.spans) == 4
    assert solved == 6, "each fork has a branch with a step that leads to a solution, if any does"
    flat = made("threadweaver", problem, tokenizer, style=style)
    assert flat.metrics().critical_path > 2 * trajectory.metrics().critical_path


@pytest.mark.parametrize("name", ["apr", "asyncthink", "pasta"])
def test_other_formats_are_an_error(name: str, tokenizer: HfTokenizer):
    with pytest.raises(apr.AprError, match=f"no demonstrations of Countdown in {name}"):
        made(name, next(generate_problems(1, "train")), tokenizer)


def test_where_no_fork_fits_into_the_window_the_search_is_sequential(tokenizer: HfTokenizer):
    problem = next(iter(generate_problems(1, "train", numbers=(6,))))
    style = SearchStyle(window=1024, forks={6: 1.0}, depth=3)
    trajectory = made("multiverse", problem, tokenizer, style=style)
    assert not trajectory.blocks
    assert trajectory.answer.rstrip().endswith("?") or Attempt(problem, trajectory).correct
