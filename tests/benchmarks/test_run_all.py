"""One command for all benchmarks, on small ones of the test's own: it goes on behind a failure and behind itself."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import BENCHMARKS

GOOD = """'''It is timed.'''
import json, sys
if __name__ == "__main__":
    assert sys.argv[1:] == ["--json"]
    with open("count", "a") as file:
        file.write("x")
    print("on stderr", file=sys.stderr)
    rows = [{"width": 2, "x": 1.5}, {"width": 4, "x": 12345.678, "why": "a|b"}]
    print(json.dumps({"tokens": 7, "rows": rows, "parts": {"one": {"s": 1}, "two": {"s": 2}}}))
"""
BAD = """import sys
if __name__ == "__main__":
    sys.exit("[red] no luck")
"""


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("all_benchmarks", BENCHMARKS / "all.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A repository with a benchmark that works, one that does not, and a module that is none."""
    directory = tmp_path / "repo" / "benchmarks"
    directory.mkdir(parents=True)
    for name, text in (("good", GOOD), ("bad", BAD), ("hardware", "X = 1\n")):
        (directory / f"{name}.py").write_text(text)
    git = ["git", "-C", str(directory), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True)
    return directory


def times_run(where: Path) -> int:
    return len((where.parent / "count").read_text())


def test_it_keeps_what_there_is_and_names_what_failed(everything, where: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert everything.main(["-o", str(out)], where) == 1
    said, err = capsys.readouterr()
    assert said.strip() == str(out / "benchmarks.md")
    assert "bad: status 1: [red] no luck" in " ".join(err.split())
    found = json.loads((out / "benchmarks.json").read_text())
    assert list(found) == ["bad", "good"]
    good = found["good"]
    assert good["ok"]
    assert good["found"]["tokens"] == 7
    assert good["command"] == ["benchmarks/good.py", "--json"]
    assert good["commit"] == everything.state(where)
    assert good["hardware"]["cores"] > 0
    assert good["versions"]["sglang"]
    assert (out / "good.log").read_text() == "on stderr\n"
    page = (out / "benchmarks.md").read_text()
    assert "| tokens | 7 |" in page
    assert "| width | x | why |" in page
    assert "| 4 | 12,345.7 | a\\|b |" in page
    assert "| two | 2 |" in page
    assert "status 1: [red] no luck" in page
    assert "sglang 0." in page


def test_what_is_there_is_not_measured_again(everything, where: Path, tmp_path: Path):
    def run(*more: str) -> int:
        return everything.main(["-o", str(tmp_path / "out"), "--only", "good", *more], where)

    assert run() == run() == 0
    assert times_run(where) == 1
    assert run("--again") == 0
    assert times_run(where) == 2
    (where / "good.py").write_text(GOOD + "# changed\n")
    assert run() == run() == 0
    assert times_run(where) == 3, "once for the changed state of the repository"


def test_what_failed_is_tried_again(everything, where: Path, tmp_path: Path):
    arguments = ["-o", str(tmp_path / "out"), "--only", "bad"]
    assert everything.main(arguments, where) == 1
    (where / "bad.py").write_text(GOOD)
    assert everything.main(arguments, where) == 0
    (where / "bad.py").write_text('if "__main__": print("no JSON")')
    assert everything.main(arguments, where) == 1


def test_a_model_that_is_not_there_is_said(everything, where: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setitem(everything.ARGUMENTS, "good", ("runs/model",))
    assert everything.main(["-o", str(tmp_path / "out"), "--only", "good"], where) == 0
    assert "good: not run, there is no runs/model" in capsys.readouterr().err


def test_every_benchmark_is_known_and_prints_json(everything, capsys):
    """Those that are programs, asked for what they can be asked for."""
    assert everything.main(["--list"]) == 0
    commands = capsys.readouterr().out.splitlines()
    names = {Path(command.split()[1]).stem for command in commands}
    parts = {"all", "ending", "figures", "hardware", "tables"}
    assert names == {p.stem for p in BENCHMARKS.glob("*.py")} - parts
    assert set(everything.ARGUMENTS) <= names
    for command in commands:
        text = (BENCHMARKS.parent / command.split()[1]).read_text()
        for flag in (word for word in command.split() if word.startswith("--")):
            assert flag in text, (command, flag)


def test_nothing_of_that_name(everything, where: Path, capsys):
    with pytest.raises(SystemExit) as left:
        everything.main(["--only", "fast"], where)
    assert left.value.code == 2
    assert "invalid choice: 'fast'" in capsys.readouterr().err
