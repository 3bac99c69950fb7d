"""Metrics of attempts against hand-computed shares, intervals and paired comparisons."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.metrics import (
    AttemptMetrics,
    MethodResults,
    bootstrap_interval,
    compare_methods,
    merge_labels,
)
from sgl_apr.evaluation.plots import plot_methods, solved_share_curve
from sgl_apr.evaluation.store import RUN_FILE, open_evaluation, read_results
from tests.support.threadweaver_traces import TRACE

ONE = AttemptMetrics("p", 4, True, tokens=100, critical_path=60, context=40, branches=3, forks=1)


def row(name: str, rights: list[bool], **more) -> MethodResults:
    made = [replace(ONE, problem=f"p{k}", correct=right, **more) for k, right in enumerate(rights)]
    return MethodResults(name, made, 2.0)


def test_only_correct_and_small_attempts_count_within_a_limit():
    attempts = [ONE, replace(ONE, context=41), replace(ONE, correct=False), replace(ONE, context=400)]
    found = MethodResults("apr", attempts)
    assert found.accuracy == 0.75
    assert [found.solved_within(w, lambda a: a.context) for w in (39, 40, 41, 1000)] == [0, 0.25, 0.5, 0.75]
    assert solved_share_curve(found, lambda a: a.context) == ([40, 41, 400], [0.25, 0.5, 0.75])


def test_the_interval_contains_the_mean_and_narrows():
    values = [1.0] * 60 + [0.0] * 40
    low, high = bootstrap_interval(values)
    assert low < 0.6 < high
    assert 0.15 < high - low < 0.25, "about 2 * 1.96 * sqrt(0.24 / 100)"
    low, high = bootstrap_interval(values * 25)
    assert high - low < 0.05


def test_a_paired_comparison_matches_hand_computed_values():
    rights = [Random(k).random() < 0.5 for k in range(40)]
    same = compare_methods(row("a", rights), row("b", rights))
    assert (same.difference, same.p, same.ci95) == (0.0, 1.0, (0.0, 0.0))
    found = compare_methods(row("a", [False] * 10), row("b", [True] * 8 + [False] * 2))
    assert found.difference == 0.8
    assert found.p == pytest.approx(2 / 2**8)
    found = compare_methods(row("a", [True] * 3 + [False] * 5), row("b", [False] * 3 + [True] * 5))
    assert found.p == pytest.approx(2 * (1 + 8 + 28 + 56) / 2**8)
    with pytest.raises(ValueError, match="same problems"):
        compare_methods(row("a", [True, True]), MethodResults("b", [ONE, ONE]))


def test_results_as_json():
    found = row("apr", [True, False]).as_json((32, 64))
    assert found["accuracy"] == 0.5
    assert found["fork_rate"] == 1.0
    assert found["by_numbers"] == {4: {"accuracy": 0.5, "fork_rate": 1.0, "branches": 3}}
    assert found["within_context"] == {32: 0.0, 64: 0.5}


def test_claims_are_counted_beside_accuracy():
    attempts = [
        replace(ONE, claimed=True),
        replace(ONE, correct=False, claimed=True),
        replace(ONE, correct=False, claimed=False),
        replace(ONE, correct=True, claimed=False),
    ]
    found = MethodResults("apr", attempts).as_json(())
    assert (found["accuracy"], found["claim_precision"], found["false_claims"]) == (0.5, 0.5, 0.25)
    unknown = row("apr", [True, False]).as_json(())
    assert (unknown["claim_precision"], unknown["false_claims"]) == (None, None)


def test_a_training_log_is_plotted(tmp_path: Path):
    plot_methods([row("a", [True] * 5), row("b", [False] * 5)], tmp_path / "curves.png", "two")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_evaluation_continues_after_its_last_complete_line(tmp_path: Path):
    settings = {"task": "countdown", "budget": {"tokens": 100}}
    with open_evaluation(tmp_path, settings) as found:
        found.add("apr", 1, ONE, 0.5)
        found.add("apr", 0, replace(ONE, problem="q"), 1.5)
    with (tmp_path / RUN_FILE).open("a") as file:
        file.write('{"method": "apr", "num')
    with open_evaluation(tmp_path, settings) as found:
        assert sorted(found.attempts["apr"]) == [(0, 0), (0, 1)]
        assert found.seconds == {"apr": 1.5}
        found.add("apr", 2, ONE, 2.0)
    (row,) = read_results(tmp_path)
    assert (row.method, [a.problem for a in row.attempts], row.wall_s) == ("apr", ["q", "p", "p"], 2.0)


def test_answers_and_trajectories_are_written_but_not_held_in_memory(tmp_path: Path):
    trajectory = apr.dialect("threadweaver").parse(TRACE + "\u2028\x85", tokenizer=apr.ByteTokenizer())
    with open_evaluation(tmp_path, {}) as found:
        found.add("apr", 0, ONE, 0.5, "4", trajectory)
        found.add("apr", 1, ONE, 0.5)
    _, first, second = map(json.loads, (tmp_path / RUN_FILE).read_text().split("\n")[:-1])
    assert (first["answer"], second["answer"], "trajectory" in second) == ("4", "", False)
    assert apr.Trajectory.from_json(json.dumps(first["trajectory"])) == trajectory
    (row,) = read_results(tmp_path)
    assert row.attempts == [ONE, ONE]


def test_other_settings_are_an_error(tmp_path: Path):
    settings = {
        "task": "a",
        "model": "m",
        "temperature": None,
        "budget": {"tokens": 100, "width": None},
        "seed": 0,
    }
    with open_evaluation(tmp_path, settings) as found:
        found.add("apr", 0, ONE, 0.5)
    for change, message in {
        "the task is a there and b here": {"task": "b"},
        "--model is m there and n here": {"model": "n"},
        "--temperature is not set there and 0.5 here": {"temperature": 0.5},
        "--budget tokens is 100 there and 50 here": {"budget": {"tokens": 50, "width": None}},
        "--budget tokens is 100 there and 50 here; --budget width is not set there and 4 here": {
            "budget": {"tokens": 50, "width": 4}
        },
        "--split is not set there and train here": {"split": "train"},
    }.items():
        with (
            pytest.raises(
                apr.AprError, match=f"holds another evaluation: {change}. Give the same options"
            ) as raised,
            open_evaluation(tmp_path, {**settings, **message}),
        ):
            pass
        assert "\n" not in str(raised.value)
    with open_evaluation(tmp_path, {**settings, "seed": 1, "limit": 5, "at_once": 2}) as found:
        assert len(found.attempts["apr"]) == 1, "a run is extended by seeds and a limit"
    with (
        open_evaluation(tmp_path, settings),
        pytest.raises(apr.AprError, match="another run"),
        open_evaluation(tmp_path, settings),
    ):
        pass
    with pytest.raises(apr.AprError, match="was not written by"):
        read_results(tmp_path / "nothing")


@pytest.mark.parametrize("text", ['{"seed": 0}\n{"method": "apr"}\n', "not JSON\n", '{"seed": 0}\n[1]\n'])
def test_another_file_is_an_error(tmp_path: Path, text: str):
    (tmp_path / RUN_FILE).write_text(text)
    for reading in (
        lambda: read_results(tmp_path),
        lambda: open_evaluation(tmp_path, {"seed": 0}).__enter__(),
    ):
        with pytest.raises(apr.AprError, match="was not written by"):
            reading()


def test_further_metrics_of_a_method():
    attempts = [
        replace(ONE, context=40, redundancy=0.5, diversity=1.0, took_s=2.0, sequential_s=3.0, parallel_s=1.0),
        replace(ONE, context=60, redundancy=None, took_s=4.0),
    ]
    found = MethodResults("apr", attempts).as_json(())
    assert (found["context_mean"], found["context_max"]) == (50.0, 60)
    assert (found["redundancy"], found["diversity"]) == (0.5, 1.0)
    assert (found["took_s"], found["predicted_sequential_s"], found["predicted_parallel_s"]) == (
        3.0,
        3.0,
        1.0,
    )
    none = MethodResults("apr", (), reason="why").as_json(())
    assert none == {name: None for name in none} | {"method": "apr", "problems": 0, "reason": "why"}
    assert set(none) - {"reason"} == {n for n in found if not n.startswith(("by_", "within_"))}


def test_fork_metrics_by_size():
    small = [
        replace(ONE, size=3, branches=4, forks=2),
        replace(ONE, size=3, branches=0, forks=0, correct=False),
    ]
    found = MethodResults("apr", [*small, replace(ONE, redundancy=0.25)]).as_json(())["by_size"]
    assert found[3] == {
        "problems": 2, "accuracy": 0.5, "fork_rate": 0.5, "branches": 2, "width": 2, "redundancy": None,
    }  # fmt: skip
    assert (found[4]["width"], found[4]["redundancy"]) == (3, 0.25)


def test_many_sizes_are_merged_into_few_groups():
    sizes = [k * k for k in range(100)]
    groups = MethodResults("apr", [replace(ONE, size=size) for size in sizes]).by_size
    assert len(groups) == 8
    assert sum(map(len, groups.values())) == 100
    assert {len(own) for own in groups.values()} <= {12, 13}
    low = -1
    for largest, own in groups.items():
        assert low < min(a.size for a in own) <= max(a.size for a in own) <= largest
        low = largest
    assert {*MethodResults("apr", [replace(ONE, size=s) for s in (1, 1, 1, *range(9))]).by_size} <= {
        *range(9)
    }


def test_files_of_older_versions_are_read(tmp_path: Path):
    kept = {
        "problem": "p",
        "size": 4,
        "correct": True,
        "tokens": 9,
        "critical_path": 5,
        "context": 7,
        "branches": 0,
        "forks": 0,
    }
    line = {"method": "apr", "number": 0, "seconds": 0.5, **kept}
    (tmp_path / RUN_FILE).write_text(json.dumps({"task": "countdown"}) + "\n" + json.dumps(line) + "\n")
    (found,) = read_results(tmp_path)
    assert found.attempts == [AttemptMetrics(**kept)]
    assert found.as_json((8,))["redundancy"] is None


@pytest.mark.parametrize(
    ("labels", "merged"),
    [
        ([], ""),
        (["exact", "", "exact"], "exact"),
        (["exact", "parallel_r1, cut"], "exact; parallel_r1, cut"),
        (["a, 1 of 3 (9 tokens)", "a", "a, 12 of 3 (0 tokens)"], "a; a, 1 to 12 of 3 (0 to 9 tokens)"),
        (["12", "3", "x"], "3 to 12; x"),
    ],
)
def test_labels_that_differ_in_numbers_alone_are_one(labels: list[str], merged: str):
    assert merge_labels(labels) == merged
