"""Figures of evaluations: lines, bands, missing values, and the command."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import pytest

import sgl_apr as apr
from sgl_apr.cli.main import main
from sgl_apr.evaluation.metrics import AttemptMetrics, MethodResults, bootstrap_interval
from sgl_apr.evaluation.plots import AXIS_LABELS, attempt_metric, bootstrap_band, load_results, plot_methods
from sgl_apr.evaluation.store import RUN_FILE

ONE = AttemptMetrics("p", 4, True, tokens=100, critical_path=60, context=40, branches=3, forks=1)
SOME = [replace(ONE, problem=f"p{k}", correct=k % 3 > 0, tokens=50 + 10 * k) for k in range(30)]


def kept(directory: Path, *methods: str, seconds: bool = False) -> Path:
    """An evaluation as `sgl-apr eval -o` writes it, or as older versions did, without wall times."""
    directory.mkdir()
    written: list[dict] = [{"task": "countdown"}]
    for method in methods:
        for number, attempt in reversed([*enumerate(SOME)]):
            attempt = replace(attempt, took_s=1.0 + number if seconds else None)
            written.append({"method": method, "number": number, "seconds": 9.0, **asdict(attempt)})
    (directory / RUN_FILE).write_text("".join(json.dumps(line) + "\n" for line in written))
    return directory


def test_a_band_ends_at_the_interval_of_the_accuracy():
    solved = sum(a.correct for a in SOME)
    low, high = bootstrap_band(solved, len(SOME))
    assert (len(low), low[0], high[0]) == (solved + 1, 0, 0)
    assert (low[-1], high[-1]) == pytest.approx(
        bootstrap_interval([float(a.correct) for a in SOME]), abs=0.04
    )
    assert all(
        below <= k / len(SOME) <= above for k, (below, above) in enumerate(zip(low, high, strict=True))
    )


@pytest.mark.parametrize("solved", [0, 1, 10])
def test_a_band_of_none_few_or_all(solved: int):
    low, high = bootstrap_band(solved, 10)
    assert len(low) == len(high) == solved + 1
    assert low[-1] == high[-1] if solved in (0, 10) else low[-1] < high[-1]


def test_attempt_metrics_are_in_the_order_of_the_problems(tmp_path: Path):
    (row,) = load_results([kept(tmp_path / "a", "apr", seconds=True)])
    assert [*map(attempt_metric("wall"), row.attempts)] == [1 + k for k in range(30)]
    assert [*map(attempt_metric("tokens"), row.attempts)][:2] == [50, 60]
    (old,) = load_results([kept(tmp_path / "b", "apr")])
    assert {*map(attempt_metric("wall"), old.attempts)} == {None}


def test_methods_are_compared_on_the_problems_that_all_attempted(tmp_path: Path, caplog):
    directory = kept(tmp_path / "run", "apr", "mcts")
    path = directory / RUN_FILE
    head, *lines = map(json.loads, path.read_text().splitlines())
    # Of mcts: no problem 5, and one more problem, of another seed.
    lines = [line for line in lines if (line["method"], line["number"]) != ("mcts", 5)]
    lines.append({**lines[-1], "method": "mcts", "seed": 7, "number": 0, "problem": "q"})
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    rows = load_results([directory])
    names = [[a.problem for a in row.attempts] for row in rows]
    assert names == [[f"p{k}" for k in range(30) if k != 5]] * 2
    assert "2 problems are left out: not all of apr, mcts attempted them" in caplog.text
    lines = [line for line in lines if line["method"] == "apr" or line.get("seed") == 7]
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    with pytest.raises(apr.AprError, match="apr, mcts have no problem in common"):
        load_results([directory])


def test_lines_have_distinct_names(tmp_path: Path):
    one, two = kept(tmp_path / "one", "apr"), kept(tmp_path / "two", "apr", "mcts")
    assert [row.method for row in load_results([two])] == ["apr", "mcts"]
    assert [row.method for row in load_results([one, two])] == ["one", "two, apr", "two, mcts"]
    (tmp_path / "other").mkdir()
    same = kept(tmp_path / "other" / "one", "apr")
    assert [row.method for row in load_results([one, same])] == [str(one), str(same)]


@pytest.mark.parametrize(("suffix", "begins"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_plot_command_writes_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, begins: bytes
):
    out = tmp_path / f"figure.{suffix}"
    assert main(["plot", str(kept(tmp_path / "run", "apr", "mcts")), "-o", str(out), "--json"]) == 0
    printed, err = capsys.readouterr()
    assert out.read_bytes().startswith(begins)
    found = json.loads(printed)
    assert found["panels"] == ["context", "tokens", "critical_path"]
    assert [(line["name"], line["attempts"]) for line in found["lines"]] == [("apr", 30), ("mcts", 30)]
    assert found["lines"][0]["accuracy"] == pytest.approx(2 / 3)
    assert err == "no panel for wall: an older version evaluated apr, mcts\n"


def test_wall_time_has_a_panel_only_where_it_was_recorded(tmp_path: Path):
    random = Random(0)
    timed = [replace(attempt, took_s=random.random()) for attempt in SOME]
    drawn = [MethodResults(name, timed) for name in ("one <b>", "two & three")]
    plot_methods(drawn, tmp_path / "figure.svg", axes=["wall", "tokens"])
    assert (tmp_path / "figure.svg").stat().st_size > 10_000
    plot_methods(drawn, tmp_path / "again.svg", axes=["wall", "tokens"])
    made = (tmp_path / "figure.svg").read_text(), (tmp_path / "again.svg").read_text()
    assert made[0] == made[1], "the same evaluation is the same file"
    assert all(
        re.search(f"<!-- {label}", made[0].replace("\\", "")) for label in ("wall time", "total tokens")
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-o", "figure.txt"], "cannot draw a .txt, expected .pdf, .svg, .png"),
        (["-o", "figure"], "cannot draw a file without a suffix"),
        (
            ["-o", "figure.pdf", "--x", "size"],
            "--x 'size', expected some of context, tokens, critical_path, wall",
        ),
        (["-o", "figure.pdf", "--x", "wall"], "apr has no values for wall: an older version evaluated it"),
    ],
)
def test_an_error_says_what_cannot_be_plotted(tmp_path: Path, capsys, argv: list[str], message: str):
    assert main(["plot", str(kept(tmp_path / "run", "apr")), *argv]) == 1
    assert message in capsys.readouterr().err
    assert not Path(argv[1]).exists()


def test_nothing_to_plot_is_an_error(tmp_path: Path, capsys):
    assert main(["plot", str(kept(tmp_path / "run")), "-o", str(tmp_path / "figure.pdf")]) == 1
    assert f"{RUN_FILE} has no attempt, expected at least one" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "nothing"), "-o", str(tmp_path / "figure.pdf")]) == 1
    assert "was not written by `sgl-apr eval" in capsys.readouterr().err
    with pytest.raises(apr.AprError, match="expected attempts of every method"):
        plot_methods([MethodResults("apr", SOME), MethodResults("mcts", ())], tmp_path / "figure.pdf")


def test_the_command_has_every_axis():
    from sgl_apr.cli.plot import AXES

    assert tuple(AXIS_LABELS) == AXES
