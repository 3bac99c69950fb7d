"""Countdown: solutions, generated problems, and the expert that demonstrates the search."""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import replace
from itertools import permutations, product

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.attempts import Attempt, final_solution
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.expert import SearchStyle
from sgl_apr.evaluation.tasks.countdown.problems import (
    LARGEST_INTERMEDIATE,
    MAX_SOLUTIONS,
    Problem,
    count_solutions,
    generate_problems,
    legal_steps,
    parse_steps,
    solves,
    two_number_problems,
)
from sgl_apr.evaluation.tasks.countdown.search import conclusion, count_tokens, sequential_search
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.config import Data
from sgl_apr.training.examples import CountdownExamples
from sgl_apr.training.models.countdown import countdown_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> HfTokenizer:
    directory = tmp_path_factory.mktemp("countdown")
    countdown_tokenizer(apr.dialect("spawn").tags).save_pretrained(directory)
    return HfTokenizer(directory, [0])


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 3+ 7= 10, 8+ 10= 18", True),
        ("3+ 7= 10, 8+ 10= 18\n", True),
        (" 7+ 3= 10, 10+ 8= 18", True),
        (" 3+ 7= 10, 8+ 10= 19", False),
        (" 3+ 7= 10", False),
        (" 8+ 10= 18", False),
        (" 3+ 7= 10, 8+ 10= 18, 18* 1= 18", False),
        (" 3+ 7= 10, 3+ 7= 10, 8+ 10= 18", False),
        (" 7/ 3= 2, 2+ 8= 10", False),
        ("18", False),
        ("", False),
        ("__import__('os')", False),
    ],
)
def test_solves(text: str, right: bool):
    assert solves(Problem((3, 7, 8), 18), text) is right


def test_all_solutions_are_counted():
    """Checked by brute force over orders of numbers and operators, left to right and in pairs."""
    rng = random.Random(0)
    for _ in range(60):
        numbers = tuple(sorted(rng.randint(1, 25) for _ in range(3)))
        reached = set()
        for (a, b, c), (s, t) in product(permutations(numbers), product("+-*/", repeat=2)):
            for x, y in ((a, b), (b, a)):
                first = {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[s]
                if (
                    first != int(first)
                    or not 0 < first <= LARGEST_INTERMEDIATE
                    or (s in "*/" and min(x, y) == 1)
                ):
                    continue
                for u, v in ((first, c), (c, first)):
                    last = {"+": u + v, "-": u - v, "*": u * v, "/": u / v}[t]
                    if (
                        last == int(last)
                        and 0 < last <= LARGEST_INTERMEDIATE
                        and not (t in "*/" and min(u, v) == 1)
                    ):
                        reached.add(int(last))
        assert {
            t for t in range(1, LARGEST_INTERMEDIATE + 1) if count_solutions(Problem(numbers, t))
        } == reached


def test_a_seed_reproduces_problems_that_are_split_by_content():
    made = list(generate_problems(200, "train", seed=3))
    assert made == list(generate_problems(200, "train", seed=3))
    assert len(set(made)) == 200
    assert all(1 <= count_solutions(p) <= MAX_SOLUTIONS and p.split == "train" for p in made)
    assert not set(made) & set(generate_problems(200, "test", seed=3))
    assert {len(p.numbers) for p in made} == {3, 4}
    with pytest.raises(apr.AprError, match="at most about"):
        list(generate_problems(10**6, "test", numbers=(2,)))


def test_a_problem_round_trips_through_its_text():
    for problem in generate_problems(50, "test"):
        assert Problem.parse(problem.text + "\n") == problem
    with pytest.raises(apr.AprError, match=" 24: 3 7 8 12"):
        Problem.parse("what is 3 + 4?")


def test_numbers_and_tags_are_single_tokens(tokenizer: HfTokenizer):
    for number in range(LARGEST_INTERMEDIATE + 1):
        assert len(tokenizer.encode(f" {number}")) == 1
    assert (
        len({tuple(tokenizer.encode(f" {n}")) for n in range(LARGEST_INTERMEDIATE + 1)})
        == LARGEST_INTERMEDIATE + 1
    )
    assert all(len(tokenizer.encode(tag)) == 1 for tag in apr.dialect("spawn").tags)
    for text in (" 24: 3 17 8 12\n 3+ 17= 20; 8 12 20\n", "any text, « at all » 1024 0"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_sequential_search_fits_its_window_and_solves(tokenizer: HfTokenizer):
    solved = 0
    for problem in generate_problems(60, "train", numbers=(4,)):
        text = sequential_search(problem, 256)
        assert len(tokenizer.encode(text)) == count_tokens(text) <= 256
        line = text.rpartition("\n")[2]
        solved += "!" in line
        assert line == "?" or solves(problem, line.partition("!")[2])
    assert 10 < solved < 60
    assert all(
        solves(p, sequential_search(p, 10**6).partition("!")[2]) for p in generate_problems(20, "train")
    )


def test_the_expert_forks_and_solves(tokenizer: HfTokenizer):
    habits = SearchStyle(forks={3: 0.0, 4: 1.0}, width=(12, 12), revisit_rate=1.0)
    for problem in generate_problems(12, "train", numbers=(3, 4)):
        attempt = Attempt(problem, asyncio.run(demonstration(problem, tokenizer, seed=1, style=habits)))
        trajectory = attempt.trajectory
        apr.dialect("spawn").validate(trajectory.text)
        assert bool(trajectory.blocks) == (len(problem.numbers) == 4)
        assert attempt.correct
        assert final_solution(trajectory)
        assert trajectory.metrics().longest_context <= habits.window
        if trajectory.blocks:
            first = trajectory.blocks[0].branches
            assert len(first) == min(11, len(legal_steps(problem.numbers))), "as many as fit the window"
            messages = [Problem.parse(b.outline.partition(";")[2]) for b in first]
            assert all(len(t.numbers) == 3 and t.target == problem.target for t in messages)


def test_a_branch_without_a_solution_names_its_step(tokenizer: HfTokenizer):
    habits = SearchStyle(forks={4: 1.0}, width=(3, 3), revisit_rate=1.0)
    failed = 0
    for problem in generate_problems(6, "train", numbers=(4,)):
        made = asyncio.run(demonstration(problem, tokenizer, seed=1, style=habits))
        messages = re.findall(r"<Message>\d+:>(.*?)=", made.text)
        results = re.findall(r"<Result>\d+:(.*?)</Result>", made.text)
        assert all(
            result in (f"?{step}", f"!{result[1:]}") for step, result in zip(messages, results, strict=True)
        )
        failed += sum(result[0] == "?" for result in results)
    assert failed > 20


def test_a_seed_reproduces_demonstrations(tokenizer: HfTokenizer):
    problem = next(generate_problems(1, "train", numbers=(4,)))
    texts = [asyncio.run(demonstration(problem, tokenizer, seed=seed)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_all_forks_have_the_stated_width(tokenizer: HfTokenizer):
    widths = set()
    for problem in generate_problems(8, "train", numbers=(4,)):
        habits = SearchStyle(forks={4: 1.0}, revisit_rate=1.0)
        made = asyncio.run(demonstration(problem, tokenizer, seed=1, style=habits, state_width=True))
        problem_text, _, stated = made.prompt.rpartition("; ")
        assert problem_text == problem.text
        assert len(made.blocks[0].branches) == int(stated)
        assert all(len(block.branches) <= int(stated) for block in made.blocks), "the last has what is left"
        widths.add(stated)
    assert len(widths) > 2


def test_a_conclusion_round_trips():
    way = legal_steps((3, 7))[:1]
    assert parse_steps(conclusion(way)[1:]) == way
    assert conclusion(None) == "?"


def test_all_pairs_are_problems_of_two_numbers():
    found = two_number_problems("train")
    assert len(found) == len(set(found)) > 400
    assert all(p.split == "train" and count_solutions(p) >= 1 for p in found)
    assert set(generate_problems(50, "train", numbers=(2,))) <= set(found)


def test_few_branches_are_selected_solutions_first(tokenizer: HfTokenizer, monkeypatch: pytest.MonkeyPatch):
    chunk_size = 64
    monkeypatch.setattr("sgl_apr.training.examples.CHUNK_SIZE", chunk_size)
    data = Data(problems=8, numbers=(2, 4), forks={"4": 1.0}, branches=1)
    few = CountdownExamples(data, tokenizer).chunk(0)
    every = CountdownExamples(replace(data, branches=0), tokenizer).chunk(0)
    texts = [tokenizer.decode(tree.tree.token_ids) for tree in few]
    assert {t.tobytes() for t in (tree.tree.token_ids for tree in few)} <= {
        t.tobytes() for t in (tree.tree.token_ids for tree in every)
    }
    messages = [text for text in texts if text.startswith(">")]
    assert len(messages) == chunk_size // 2, "one of every fork"
    assert len(texts) - len(messages) == chunk_size, "all trunks"
    assert sum("!" in text for text in messages) > 0.6 * len(messages)
    unselected = [text for tree in every if (text := tokenizer.decode(tree.tree.token_ids)).startswith(">")]
    assert sum("!" in text for text in unselected) < 0.3 * len(unselected)


def test_a_hinted_fork_has_a_solution_among_few_branches(tokenizer: HfTokenizer):
    habits = SearchStyle(forks={4: 1.0}, width=(2, 3), hint_rate=1.0)
    for problem in generate_problems(8, "train", numbers=(4,)):
        made = asyncio.run(demonstration(problem, tokenizer, seed=2, style=habits))
        assert Attempt(problem, made).correct
        assert sum(len(block.branches) for block in made.blocks) <= 3
    made = asyncio.run(demonstration(Problem((1, 1, 1, 1), 99), tokenizer, seed=2, style=habits))
    assert made.answer.strip() == "?"


@pytest.mark.parametrize("wrong", [{"numbers": ()}, {"numbers": (3, 1)}, {"problems": 0}])
def test_impossible_examples_are_an_error(tokenizer: HfTokenizer, wrong: dict):
    with pytest.raises(apr.AprError, match="expected some, with at least 2 each"):
        CountdownExamples(replace(Data(problems=8), **wrong), tokenizer)
