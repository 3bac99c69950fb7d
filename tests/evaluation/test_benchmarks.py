"""Benchmarks: reproducible problems, correct answers, and errors for unknown names."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.benchmarks.base import Benchmark, Case
from sgl_apr.evaluation.benchmarks.games import game24_problems
from sgl_apr.evaluation.benchmarks.registry import benchmark
from sgl_apr.evaluation.tasks.countdown.problems import Problem, count_solutions, generate_problems
from sgl_apr.evaluation.tasks.countdown.task import CountdownTask
from sgl_apr.evaluation.tasks.json_worker import JsonWorker
from sgl_apr.evaluation.tasks.mathematics import FORMULA_WORKER, MathTask
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.models import locate_model


def names(made: Benchmark) -> list[str]:
    return [case.name for case in made.cases]


@pytest.mark.parametrize("name", ["countdown", "game24"])
def test_a_seed_reproduces_distinct_problems(name: str):
    found = benchmark(name, 40)
    assert names(found) == names(benchmark(name, 40))
    assert names(found)[:7] == names(benchmark(name, 7))
    assert names(found) != names(benchmark(name, 40, seed=1))
    assert not set(names(found)) & set(names(benchmark(name, 40, "train")))
    assert len(found.cases) == 40
    assert all(case.problem == Problem.parse(case.name) for case in found.cases)
    assert found.task is CountdownTask


def test_countdown_problems_do_not_change():
    given = list(generate_problems(30, "test", seed=3))
    found = benchmark("countdown", 30, seed=3)
    assert [case.problem for case in found.cases] == given
    assert [case.size for case in found.cases] == [len(p.numbers) for p in given]
    assert found.budget == apr.Budget(tokens=6000), (
        "another limit would cut the replies of methods that sample"
    )


def test_variants_of_countdown():
    five = benchmark("countdown:5", 3)
    assert {case.size for case in five.cases} == {5}
    without = benchmark("countdown:unsolvable", 12)
    assert {case.size for case in without.cases} == {3, 4}
    assert all(count_solutions(case.problem) == 0 for case in without.cases)
    assert without.is_correct(without.cases[0], " ")
    assert not without.is_correct(without.cases[0], "1+ 2= 3")
    both = benchmark("countdown:2,unsolvable", 4)
    assert {(case.size, count_solutions(case.problem)) for case in both.cases} == {(2, 0)}
    assert (five.name, both.directory) == ("countdown:5", "countdown-2-unsolvable")
    six = benchmark("countdown:6", 2)
    assert all(count_solutions(case.problem) for case in six.cases)
    with pytest.raises(apr.AprError, match="hardly any problem of six numbers has no solution"):
        benchmark("countdown:6,unsolvable", 2)
    for variant in ("7", "hard", "3,4", "4,solvable"):
        with pytest.raises(
            apr.AprError, match=f"no variant '{variant}' of countdown, expected one of 2, 3, 4, 5, 6"
        ):
            benchmark(f"countdown:{variant}", 3)


def test_game24_problems_reach_24():
    found = benchmark("game24", 2000)
    assert 100 < len(found.cases) < 200, "all of the split that there are"
    for case in found.cases:
        assert case.problem.target == 24
        assert len(case.problem.numbers) == 4
        assert 1 <= min(case.problem.numbers) <= max(case.problem.numbers) <= 13
        assert case.size == {1: 4, 2: 3, 3: 2}.get(count_solutions(case.problem).bit_length(), 1)
        assert not found.is_correct(case, "")
    four = Case("", Problem((4, 6, 10, 10), 24))
    assert found.is_correct(four, " 10- 10= 0, 4* 6= 24") is False, "zero is no number on the way"
    assert found.is_correct(Case("", Problem((1, 2, 3, 4), 24)), " 1* 2= 2, 2* 3= 6, 4* 6= 24")
    first = list(islice(game24_problems(0), 5))
    assert len({*first}) == 5
    assert first == list(islice(game24_problems(0), 5))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small aime.jsonl"
    lines = [
        {"id": "2024-I-1", "problem": "What is half of one?", "answer": "\\frac{1}{2}", "level": "Level 5"},
        {"question": "Six times seven?", "answer": 42, "level": 1, "solution": "..."},
        {"problem": "And more?", "answer": "x+1"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return path


def test_a_file_of_problems(file: Path):
    found = benchmark(str(file), 100)
    assert (found.name, found.directory) == ("small aime", "small-aime")
    first, second, third = found.cases
    assert (first.name, first.problem, first.size) == ("2024-I-1", "What is half of one?", 5)
    assert (second.size, third.size) == (1, 0)
    assert names(found) == names(benchmark(str(file), 100))
    assert len(set(names(found))) == 3
    assert names(benchmark(str(file), 2)) == names(found)[:2]
    right = [(first, "0.5"), (first, "\\frac{2}{4}"), (second, "42"), (third, "1 + x")]
    wrong = [(first, "2"), (first, ""), (second, ""), (third, "x")]
    assert [found.is_correct(*said) for said in right] == [True] * 4
    assert [found.is_correct(*said) for said in wrong] == [False] * 4
    assert found.task is MathTask
    FORMULA_WORKER.close()


@pytest.mark.parametrize(
    "line", ["{", "[]", "7", '{"answer": "1"}', '{"problem": "?"}', '{"problem": 1, "answer": "1"}',
             '{"problem": "?", "answer": " "}', '{"problem": "?", "answer": null}'],
)  # fmt: skip
def test_an_error_names_the_line_that_is_not_a_problem(file: Path, line: str):
    file.write_text(file.read_text() + line + "\n")
    assert len(benchmark(str(file), 3).cases) == 3, "what is not asked for is not read"
    with pytest.raises(apr.AprError, match=r'small aime\.jsonl, line 5: expected \{"problem" or "question"'):
        benchmark(str(file), 100)


def test_an_unknown_benchmark_is_an_error(tmp_path: Path, file: Path):
    for name in ("chess", "gym:", "gym", "game24:4"):
        with pytest.raises(
            apr.AprError, match="expected one of countdown, countdown:VARIANT, game24, gym:NAME"
        ):
            benchmark(name, 1)
    with pytest.raises(apr.AprError, match="cannot read"):
        benchmark(str(tmp_path / "none.jsonl"), 1)
    with pytest.raises(apr.AprError, match="limit=0"):
        benchmark("countdown", 0)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(apr.AprError, match="no problem"):
        benchmark(str(tmp_path / "empty.jsonl"), 1)
    file.write_text(file.read_text() * 2)
    with pytest.raises(apr.AprError, match="two problems of the same name"):
        benchmark(str(file), 100)


@pytest.fixture(scope="module")
def judge() -> Iterator[JsonWorker]:
    pytest.importorskip("reasoning_gym", reason="pip install 'sgl-apr[gym]'")
    from sgl_apr.evaluation.benchmarks.gym import JUDGE

    yield JUDGE
    JUDGE.close()


def test_a_gym_dataset_judges_its_own_answers(judge: JsonWorker):
    import reasoning_gym

    found = benchmark("gym:leg_counting", 6)
    entries = list(reasoning_gym.create_dataset("leg_counting", seed=0, size=6))
    assert [case.problem for case in found.cases] == [entry["question"] for entry in entries]
    assert [case.size for case in found.cases] == [entry["metadata"]["num_animals"] for entry in entries]
    judge.close()  # it is begun anew, and makes them again
    for case, entry in zip(found.cases, entries, strict=True):
        assert found.is_correct(case, entry["answer"])
        assert not found.is_correct(case, entry["answer"] + "1")
        assert not found.is_correct(case, "")
    assert found.cases[0].problem != benchmark("gym:leg_counting", 6, "train").cases[0].problem
    assert found.directory == "gym-leg_counting"


def test_answers_that_are_programs_are_isolated(judge: JsonWorker, tmp_path: Path):
    """This dataset reads an answer with `eval`."""
    found, mark = benchmark("gym:spiral_matrix", 2), tmp_path / "mark"
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    programs = [
        f"__import__('os').system('touch {mark}')", f"[open({str(mark)!r}, 'w')]", f"open({str(kept)!r}, 'w')",
        f"__import__('os').remove({str(kept)!r})", f"__import__('os').truncate({str(kept)!r}, 0)",
        "__import__('socket').socket()", "__import__('os').kill(__import__('os').getppid(), 9)", "__import__('os').fork()",
        "exit()", "print('0')", "[0] * 10**11", "__import__('sys').stdin.read()", "__import__('os').write(1, b'{}')",
    ]  # fmt: skip
    began = time.monotonic()
    assert not any(found.is_correct(case, program) for case in found.cases for program in programs)
    assert time.monotonic() - began < 20
    assert (mark.exists(), kept.read_text()) == (False, "as it was")
    case = found.cases[0]
    grid = [line.split() for line in case.problem.rpartition("?\n")[2].splitlines()]
    assert found.is_correct(case, " ".join(spiral(grid))), "and it goes on judging"


def spiral(grid: list[list[str]]) -> list[str]:
    return grid[0] + spiral([list(row) for row in zip(*grid[1:], strict=True)][::-1]) if grid else []


@pytest.mark.slow  # it takes the time that an answer may take
def test_a_slow_answer_is_wrong(judge: JsonWorker):
    found = benchmark("gym:spiral_matrix", 1)
    began = time.monotonic()
    assert not found.is_correct(found.cases[0], "[9**9**9]")
    assert time.monotonic() - began < 25


def test_an_unknown_dataset_is_an_error(judge: JsonWorker, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(apr.AprError, match="no dataset 'chess' in reasoning-gym, expected one of ab, acre"):
        benchmark("gym:chess", 2)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(apr.MissingExtra, match="needs reasoning-gym: pip install 'reasoning-gym=="):
        benchmark("gym:ab", 2)


def test_the_gym_task_reads_answers_between_tags():
    from sgl_apr.evaluation.benchmarks.gym import GymTask

    task = GymTask(apr.ScriptedEngine(lambda request, prompt: ""))
    assert "<answer>" in task.prompt("Why?").text
    assert task.answer("<answer>1</answer>, no: <answer>\n2 3\n4 5\n</answer> it is") == "2 3\n4 5"
    assert task.answer("I think.\nAnswer: 42") == "42"
    assert [task.has_answer(text) for text in ("so 1", "<answer>1</answer>", "Answer: 1")] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(("model", "least"), [("builtin", 2048), ("builtin:spawn", 0)])
def test_a_model_that_searches_only_in_branches_forks_under_any_budget(model: str, least: int):
    """`builtin:spawn` was trained on forked searches alone, the built-in model on others as well."""
    engine = apr.ScriptedEngine(lambda *_: "", HfTokenizer(str(locate_model(model))))
    assert CountdownTask(engine).min_fork_tokens == least
