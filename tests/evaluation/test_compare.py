"""Paired comparisons of evaluations, and `sgl-apr eval` without a server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.cli.main import main
from sgl_apr.evaluation.compare import pair_evaluations
from sgl_apr.evaluation.metrics import AttemptMetrics
from sgl_apr.evaluation.store import RUN_FILE, SUMMARY_FILE, open_evaluation

ONE = AttemptMetrics("p", 4, True, tokens=100, critical_path=60, context=40, branches=3, forks=1)


def kept(directory: Path, rights: dict[str, list[bool]], first: int = 0, **more: int | str) -> Path:
    """An evaluation whose methods took 10 tokens more for each problem after the first."""
    with open_evaluation(directory, {"task": more.pop("task", "sums")}) as found:
        for method, solved in rights.items():
            for k, right in reversed(list(enumerate(solved))):
                attempt = replace(ONE, problem=f"p{first + k}", correct=right, **more)
                found.add(method, k, replace(attempt, tokens=attempt.tokens + 10 * (first + k)), 1.0)
    return directory


def test_two_evaluations_of_one_method_each(tmp_path: Path):
    a = kept(tmp_path / "a", {"sequential": [False] * 8 + [True] * 2})
    b = kept(tmp_path / "b", {"apr": [True] * 8 + [True, False]}, tokens=80, critical_path=30)
    (found,) = pair_evaluations(str(a), str(b))
    assert found.as_json() == {
        "methods": ["a:sequential", "b:apr"],
        "problems": 10,
        "accuracy": [0.2, 0.9],
        "difference": 0.7,
        "ci95": found.as_json()["ci95"],
        "p": pytest.approx(2 * (1 + 9) / 2**9),
        "total_tokens": {"means": [145.0, 125.0], "difference": -20.0, "ci95": [-20.0, -20.0]},
        "critical_path": {"means": [60.0, 30.0], "difference": -30.0, "ci95": [-30.0, -30.0]},
    }
    low, high = found.comparison.ci95
    assert low < 0.7 < high


@pytest.mark.parametrize(
    "names", [("", ""), (f"/{RUN_FILE}", ""), (f"/{SUMMARY_FILE}", f"/{RUN_FILE}"), (":apr", ":apr")]
)
def test_an_evaluation_is_named_by_its_directory_or_a_file(tmp_path: Path, names: tuple[str, str]):
    a, b = kept(tmp_path / "a", {"apr": [True, False]}), kept(tmp_path / "b:1", {"apr": [True, True]})
    (a / SUMMARY_FILE).touch()
    (found,) = pair_evaluations(f"{a}{names[0]}", f"{b}{names[1]}")
    assert found.comparison.difference == 0.5


def test_methods_of_one_evaluation_and_methods_that_both_have(tmp_path: Path):
    a = kept(tmp_path / "a", {"apr": [True] * 3, "mcts": [False] * 3, "npr": [True] * 3})
    b = kept(tmp_path / "b", {"mcts": [True] * 3, "apr": [False] * 3})
    (found,) = pair_evaluations(f"{a}:apr", f"{a}:mcts")
    assert (found.names, found.comparison.difference) == (("a:apr", "a:mcts"), -1.0)
    found, other = pair_evaluations(str(a), str(b))
    assert (found.names, found.comparison.difference) == (("a:apr", "b:apr"), -1.0)
    assert (other.names, other.comparison.difference) == (("a:mcts", "b:mcts"), 1.0)
    with pytest.raises(apr.AprError, match="no attempt of sequential, its methods: apr, mcts, npr"):
        pair_evaluations(f"{a}:sequential", str(b))
    c = kept(tmp_path / "c", {"sequential": [True] * 3})
    with pytest.raises(apr.AprError, match="expected one method of each"):
        pair_evaluations(str(a), str(c))
    assert len(pair_evaluations(f"{a}:apr", str(c))) == 1


def test_only_common_problems_count_in_any_order(tmp_path: Path):
    a = kept(tmp_path / "a", {"apr": [True, False, True, False]})
    b = kept(tmp_path / "b", {"apr": [True, True]}, first=2)
    (found,) = pair_evaluations(str(a), str(b))
    assert (
        [x.problem for x in found.results[0].attempts]
        == [x.problem for x in found.results[1].attempts]
        == ["p2", "p3"]
    )
    assert found.comparison.difference == 0.5
    c = kept(tmp_path / "c", {"apr": [True]}, first=7)
    with pytest.raises(apr.AprError, match="no problem in common"):
        pair_evaluations(str(a), str(c))
    d = kept(tmp_path / "d", {"apr": [True]}, task="products")
    with pytest.raises(apr.AprError, match=r"evaluated sums, .* evaluated products, expected the same task"):
        pair_evaluations(str(a), str(d))


def test_the_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = kept(tmp_path / "a", {"apr": [True, False] * 5}), kept(tmp_path / "b[red]", {"apr": [True] * 10})
    assert main(["eval", "--compare", str(a), str(b), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["pairs"]
    assert (found["accuracy"], found["difference"]) == ([0.5, 1.0], 0.5)
    assert main(["eval", "--compare", str(a), str(b)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "50.0%" in shown
    assert "[red]" in shown
    assert main(["eval", "--compare", str(a), str(tmp_path / "none")]) == 1
    assert "was not written by `sgl-apr eval ... -o`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["countdown"], "no model: expected --model or --url"),
        (["--model", "builtin"], "no task: expected some of countdown"),
        (["countdown", "--compare", "a", "b"], "expected no task"),
        (["countdown", "--model", "a", "--url", "b"], "not allowed with"),
        (["countdown", "--model", "a", "--budget", "speed=1"], "--budget"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["eval", *argv])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["chess"],
            "no task 'chess', expected one of countdown, countdown:VARIANT, game24, gym:NAME, ledger:SIZE, FILE.jsonl",
        ),
        (["game24", "none.jsonl"], "cannot read none.jsonl"),
        (["countdown", "--limit", "0"], "limit=0"),
        (["game24", "game24", "-o", "out"], "two tasks of the same name"),
        (["countdown", "game24", "--limit", "2"], "no server at http://127.0.0.1:9"),
    ],
)
def test_errors_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", *argv, "--url", "http://127.0.0.1:9"]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert err.splitlines()[-1].startswith("sgl-apr: error: ")
    assert not out


def test_each_task_has_its_own_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = [
        "eval",
        "countdown",
        "game24",
        "--limit",
        "2",
        "--url",
        "http://127.0.0.1:9",
        "-o",
        str(tmp_path),
    ]
    assert main(argv) == 1
    heads = {p.parent.name: json.loads(p.read_text().splitlines()[0]) for p in tmp_path.glob(f"*/{RUN_FILE}")}
    assert {name: head["task"] for name, head in heads.items()} == {
        "countdown": "countdown",
        "game24": "game24",
    }
    assert main([*argv, "--split", "train"]) == 1
    assert "holds another evaluation: --split is test there and train here" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["eval", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for piece in ("gym:leg_counting aime.jsonl", "--compare out:apr out:sequential", "--cost-model"):
        assert piece in shown
