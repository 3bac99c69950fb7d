"""Sweeps of a limit: levels, directories, paired tests, and the curves of `sgl-apr plot`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import sgl_apr as apr
from sgl_apr.cli.main import main
from sgl_apr.evaluation.metrics import AttemptMetrics, MethodResults
from sgl_apr.evaluation.plots import plot_sweep
from sgl_apr.evaluation.report_files import expand_sweeps, read_entries
from sgl_apr.evaluation.store import RUN_FILE
from sgl_apr.evaluation.sweep import (
    SweepLevel,
    compare_with_best,
    parse_levels,
    read_sweep,
    sweep_directories,
)
from tests.views.test_page import sampled

ONE = AttemptMetrics("p", 4, True, tokens=100, critical_path=60, context=40, branches=3, forks=1)


def attempts(solved: int, count: int = 20) -> list[AttemptMetrics]:
    return [replace(ONE, problem=f"p{k}", correct=k < solved) for k in range(count)]


def sweep(directory: Path, solved: dict[str, dict[str, int]], with_trajectories: bool = False) -> Path:
    """A sweep as `sgl-apr eval --sweep -o` writes it: problems solved by level and by method."""
    trajectory = json.loads(sampled("spawn").to_json()) if with_trajectories else None
    for name, methods in solved.items():
        path = directory / name
        path.mkdir(parents=True)
        lines: list[dict] = [{"task": "countdown", "seed": 0}]
        for method, right in methods.items():
            for number, attempt in enumerate(attempts(right)):
                line = {"method": method, "number": number, "seconds": 9.0, **asdict(attempt)}
                if with_trajectories:
                    line |= {"answer": "1", "trajectory": trajectory}
                lines.append(line)
        (path / RUN_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


SOLVED = {
    "tokens-1024": {"apr": 18, "mcts": 9},
    "tokens-256": {"apr": 6, "mcts": 2},
    "seconds-0.5": {"apr": 4, "mcts": 4},
}


def test_levels_are_parsed_and_applied():
    assert parse_levels("tokens=256, 512") == [SweepLevel("tokens", 256), SweepLevel("tokens", 512)]
    budget = apr.Budget(tokens=4096, width=4)
    under = SweepLevel("tokens", 256).applied_to(budget)
    assert under == apr.Budget(tokens=256, width=4)
    assert isinstance(under.tokens, int)
    assert SweepLevel("seconds", 0.5).applied_to(budget).seconds == 0.5
    assert SweepLevel("calls", 3).applied_to(budget).calls == 3
    assert SweepLevel("critical_tokens", 300).applied_to(budget).critical_tokens == 300


@pytest.mark.parametrize(
    "text", ["tokens", "tokens=", "tokens=a", "tokens=0", "tokens=-1", "seconds=inf", "seconds=nan", "width=4", "=3", ""]
)  # fmt: skip
def test_anything_else_is_refused(text: str):
    with pytest.raises(apr.AprError, match="expected one of tokens, critical_tokens, calls, seconds"):
        parse_levels(text)


def test_half_a_token_is_refused():
    with pytest.raises(apr.AprError, match=r"--sweep tokens=1.5, expected whole tokens"):
        SweepLevel("tokens", 1.5).applied_to(apr.Budget())


def test_a_sweep_is_found_in_its_directory(tmp_path: Path):
    directory = sweep(tmp_path / "out", SOLVED)
    (directory / "tokens-9").mkdir()  # without an evaluation
    (directory / "tokens-many").mkdir()
    assert [str(level) for level in sweep_directories(directory)] == [
        "seconds=0.5",
        "tokens=256",
        "tokens=1024",
    ]
    assert sweep_directories(directory / "tokens-256") == sweep_directories(tmp_path / "none") == {}
    read = read_sweep(directory)
    assert [row.accuracy for row in read[SweepLevel("tokens", 256)]] == [0.3, 0.1]


def test_each_method_is_compared_with_the_best():
    rows = [MethodResults("apr", attempts(18)), MethodResults("mcts", attempts(9)), MethodResults("x", ())]
    best, worse = compare_with_best(rows)
    assert (best["method"], best["best"], best["difference"], best["p"]) == ("apr", "apr", 0.0, 1.0)
    assert (worse["best"], worse["difference"]) == ("apr", -0.45)
    assert worse["ci95"][1] < 0
    assert worse["p"] == pytest.approx(2 / 2**9)  # nine problems that only apr solved
    assert compare_with_best([MethodResults("x", ())]) == []


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot_command_draws_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str):
    out = tmp_path / f"figure.{suffix}"
    assert main(["plot", str(sweep(tmp_path / "out", SOLVED)), "-o", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["panels"] == ["seconds", "tokens"]
    found = {
        (line["limit"], line["value"], line["name"]): round(20 * line["accuracy"])
        for line in printed["lines"]
    }
    assert found == {
        (name.split("-")[0], float(name.split("-")[1]), method): solved
        for name, methods in SOLVED.items()
        for method, solved in methods.items()
    }
    assert out.stat().st_size > 5_000
    if suffix == "svg":
        assert "1024" in out.read_text()


def test_a_method_that_could_not_run_has_no_line(tmp_path: Path):
    level = SweepLevel("tokens", 256)
    rows = [MethodResults("apr", attempts(3)), MethodResults("mcts", (), reason="no steps")]
    plot_sweep({level: rows, SweepLevel("seconds", 1): [rows[1]]}, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert "<!-- apr -->" in text
    assert "mcts" not in text
    with pytest.raises(apr.AprError, match="nothing to draw"):
        plot_sweep({level: [rows[1]]}, tmp_path / "figure.svg")


@pytest.mark.parametrize("limits", [("tokens",), ("tokens", "seconds")])
@pytest.mark.parametrize("count", [2, 7, 18])
def test_the_legend_is_inside_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: tuple[str, ...], count: int
):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[-1]
    )
    rows = [MethodResults(f"graph_of_thoughts_{k}"[-17:], attempts(k)) for k in range(count)]
    plot_sweep({SweepLevel(limit, n): rows for limit in limits for n in (1, 2)}, tmp_path / "figure.png")
    (figure,) = figures
    legend, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= legend.x0
    assert legend.x1 <= whole.x1
    assert all(axes.get_position().height > 0.3 for axes in figure.axes)


def test_a_sweep_has_axes_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = sweep(tmp_path / "out", SOLVED)
    for argv in (["--x", "tokens"], [str(tmp_path)]):
        assert main(["plot", str(out), *argv, "-o", str(tmp_path / "f.svg")]) == 1
        assert "expected one directory and no --x" in capsys.readouterr().err


def test_entries_of_a_page_know_their_limit(tmp_path: Path):
    out = sweep(tmp_path / "out", SOLVED, with_trajectories=True)
    entries = [*read_entries(expand_sweeps([out]))]
    assert len(entries) == 120
    assert {entry.method for entry in entries} == {"apr", "mcts"}
    assert {entry.limit for entry in entries} == {("tokens", 256.0), ("tokens", 1024.0), ("seconds", 0.5)}
    both = [*read_entries(expand_sweeps([out, sweep(tmp_path / "two", {"calls-3": {"apr": 1}}, True)]))]
    assert {entry.method for entry in both} == {"out apr", "out mcts", "two apr"}
    alone = sweep(tmp_path / "other", {"run": {"apr": 1}}, True) / "run"
    assert {entry.limit for entry in read_entries(expand_sweeps([alone]))} == {None}
