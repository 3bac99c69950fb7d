"""The results of the schools: models are measured one after another, and a file of each is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import schools


def write_result(directory: Path, name: str, seed: int, **solved: str) -> None:
    """What a model did under each join."""
    rows = [
        {"join": join, "trained_for_it": join == "kv", "solved": each}
        | dict.fromkeys(schools.FIGURES, float(seed))
        | {"accuracy": each.count("1") / len(each)}
        for join, each in solved.items()
    ]
    result = {
        "format": name,
        "seed": seed,
        "hardware": {"cpu": "a CPU", "cores": 2},
        "problems": 4,
        "rows": rows,
    }
    (directory / f"{name}-{seed}.json").write_text(json.dumps(result))


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_seeds_are_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write_result(tmp_path, "multiverse", 0, kv="1100", text="1000")
    write_result(tmp_path, "multiverse", 1, kv="1110", text="0000")
    argv = ["schools", "-d", str(tmp_path / "none"), "--results", str(tmp_path), "--limit", "4", "--json"]
    monkeypatch.setattr("sys.argv", argv)
    assert schools.main() == 0
    result = printed(capsys)
    assert result["measured_on"] == ["a CPU"]
    own, other = result["rows"]
    assert (own["join"], own["trained_for_it"], own["seeds"]) == ("kv", True, [0.5, 0.75])
    assert (own["accuracy"], own["tokens"]) == (0.625, 0.5)
    assert own["accuracy_ci95"][0] < 0.625 < own["accuracy_ci95"][1]
    assert (other["join"], other["trained_for_it"], other["accuracy"]) == ("text", False, 0.125)


def test_a_model_that_has_a_result_is_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("spawn-0", "spawn-1", "other"):
        (tmp_path / "runs" / name / "model").mkdir(parents=True)
    write_result(tmp_path, "spawn", 0, message="1111")
    measured = []

    def measure(run: Path, problems: Any, at_once: int) -> dict[str, Any]:
        measured.append((run.name, len(problems)))
        write_result(tmp_path, "spawn", 1, message="0000")
        return json.loads((tmp_path / "spawn-1.json").read_text())

    monkeypatch.setattr(schools, "measure", measure)
    argv = ["schools", "-d", str(tmp_path / "runs"), "--results", str(tmp_path), "--limit", "4", "--json"]
    monkeypatch.setattr("sys.argv", argv)
    schools.main()
    schools.main()
    assert measured == [("spawn-1", 4)]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["seeds"] == [1.0, 0.0]


def test_without_models_and_results_it_says_how_to_train_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["schools", "-d", str(tmp_path), "--results", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        schools.main()
    assert "docs/schools.md says how to train them" in capsys.readouterr().err
