"""The model that ships with the package, on a real server: it solves problems, and forks where that helps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sgl_apr.cli.main import main
from sgl_apr.errors import AprError
from sgl_apr.evaluation.store import RUN_FILE
from sgl_apr.formats.presets import known_dialects
from sgl_apr.server.launch.launcher import Server
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.models import builtin_path, describe, locate_model
from sgl_apr.training.models.builtin import DIRECTORIES
from tests.support.paths import EXAMPLES

pytestmark = pytest.mark.server
LIMIT = 6


@pytest.fixture(scope="module")
def url(solver: Server) -> str:
    return solver.url


def test_it_is_small_and_has_its_tags(capsys: pytest.CaptureFixture[str]):
    paths = [builtin_path(name) for name in DIRECTORIES]
    assert sum(file.stat().st_size for path in paths for file in path.iterdir()) <= 8 << 20
    for name, path in zip(DIRECTORIES, paths, strict=True):
        assert describe(path)["parameters"] <= 3_000_000
        assert main(["model", name]) == 0
        assert capsys.readouterr().out.strip() == str(path) == locate_model(name)
        assert main(["model", name, "--tags", "npr"]) == 1
    assert locate_model("elsewhere") == "elsewhere"
    with pytest.raises(AprError, match="expected builtin or builtin:spawn"):
        locate_model("builtin:npr")


def test_it_knows_the_formats_that_it_was_trained_on():
    known = [dialect.name for dialect in known_dialects(HfTokenizer(builtin_path()))]
    assert known == ["multiverse", "threadweaver", "npr", "parallel_r1", "parathinker", "spawn"]
    assert [d.name for d in known_dialects(HfTokenizer(builtin_path("builtin:spawn")))] == ["spawn"]


def test_serve_knows_the_names_of_models(monkeypatch: pytest.MonkeyPatch):
    served = []
    monkeypatch.setattr("sgl_apr.server.launch.launcher.serve", lambda argv: served.append(argv) or 0)
    path = str(builtin_path())
    for model in (
        ["--model", "builtin"],
        ["--model-path", "builtin"],
        ["--model=builtin"],
        ["--model", "a/b"],
    ):
        assert main(["serve", *model, "--port", "1"]) == 0
    assert [argv[:-2] for argv in served] == [
        ["--model", path], ["--model-path", path], [f"--model={path}"], ["--model", "a/b"],
    ]  # fmt: skip
    assert main(["serve", "--model"]) == 0
    assert served[-1] == ["--model"], "the parser of the server says what is missing"


def test_it_solves_problems_and_an_evaluation_continues(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["eval", "countdown", "--url", url, "--limit", str(LIMIT), "-o", str(tmp_path), "--json"]
    words += ["--budget", "tokens=2500,width=16,branch_tokens=160"]
    assert main(words) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["accuracy"] > 0.6
    assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
    assert row["by_numbers"]["3"]["fork_rate"] < 0.5 < row["by_numbers"]["4"]["fork_rate"]
    assert row["critical_path"] < row["total_tokens"]
    run = tmp_path / RUN_FILE
    lines = run.read_text().splitlines(keepends=True)
    assert len(lines) == LIMIT + 1
    run.write_text("".join(lines[:4]) + lines[4][:50])  # as a kill leaves it
    assert main(words) == 0
    again = run.read_text().splitlines(keepends=True)
    assert again[:4] == lines[:4]
    assert sorted(json.loads(line)["number"] for line in again[1:]) == list(range(LIMIT))
    words[words.index("--budget") + 1] = "tokens=2400,width=16,branch_tokens=160"
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "2500" in error
    assert "2400" in error


def test_the_demo_shows_its_choices(url: str):
    example = EXAMPLES / "countdown.py"
    done = subprocess.run(
        [sys.executable, str(example), "--url", url], capture_output=True, text=True, timeout=200, check=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["ok"]
    assert figures["solved"] >= 5
    assert 0 < figures["forked"] < figures["problems"]
    assert figures["cached_share"] >= 0.95
    assert figures["kv_joins"] >= figures["forked"]
    assert figures["text_joins"] == 0
    assert "fork into" in done.stdout
