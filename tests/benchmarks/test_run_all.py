"""One command runs all benchmarks, here small ones of the test: it continues after a failure and after an earlier run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import run_all
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
def package(tmp_path: Path) -> Path:
    """A repository with a benchmark that works, one that fails, a module that is no program, and a tool at the top."""
    package = tmp_path / "repo" / "benchmarks"
    (package / "kind").mkdir(parents=True)
    files = {"kind/good": GOOD, "kind/bad": BAD, "kind/hardware": "X = 1\n", "render_docs": GOOD}
    for name, text in (files | {"__init__": "", "kind/__init__": ""}).items():
        (package / f"{name}.py").write_text(text)
    git = ["git", "-C", str(package), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True)
    return package


def times_run(package: Path) -> int:
    return len((package.parent / "count").read_text())


def test_results_are_kept_and_failures_are_named(package: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert run_all.main(["-o", str(out)], package) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout.strip() == str(out / "benchmarks.md")
    assert "kind.bad: status 1: [red] no luck" in " ".join(stderr.split())
    entries = json.loads((out / "benchmarks.json").read_text())
    assert list(entries) == ["kind.bad", "kind.good"]
    good = entries["kind.good"]
    assert good["ok"]
    assert good["found"]["tokens"] == 7
    assert good["command"] == ["-m", "benchmarks.kind.good", "--json"]
    assert good["commit"] == run_all.repository_state(package)
    assert good["hardware"]["cores"] > 0
    assert good["versions"]["sglang"]
    assert (out / "kind.good.log").read_text() == "on stderr\n"
    page = (out / "benchmarks.md").read_text()
    assert "`python -m benchmarks.kind.good --json`" in page
    assert "| tokens | 7 |" in page
    assert "| width | x | why |" in page
    assert "| 4 | 12,345.7 | a\\|b |" in page
    assert "| two | 2 |" in page
    assert "status 1: [red] no luck" in page
    assert "sglang 0." in page


def test_what_has_a_result_is_not_run_again(package: Path, tmp_path: Path):
    def run(*more: str) -> int:
        return run_all.main(["-o", str(tmp_path / "out"), "--only", "kind.good", *more], package)

    assert run() == run() == 0
    assert times_run(package) == 1
    assert run("--again") == 0
    assert times_run(package) == 2
    (package / "kind" / "good.py").write_text(GOOD + "# changed\n")
    assert run() == run() == 0
    assert times_run(package) == 3, "once for the changed state of the repository"


def test_what_failed_is_run_again(package: Path, tmp_path: Path):
    arguments = ["-o", str(tmp_path / "out"), "--only", "kind.bad"]
    assert run_all.main(arguments, package) == 1
    (package / "kind" / "bad.py").write_text(GOOD)
    assert run_all.main(arguments, package) == 0
    (package / "kind" / "bad.py").write_text('if "__main__": print("no JSON")')
    assert run_all.main(arguments, package) == 1


def test_a_missing_model_is_named(package: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setitem(run_all.ARGUMENTS, "kind.good", ("runs/model",))
    assert run_all.main(["-o", str(tmp_path / "out"), "--only", "kind.good"], package) == 0
    assert "kind.good: skipped, runs/model does not exist" in capsys.readouterr().err


def test_every_benchmark_is_listed_and_takes_its_arguments(capsys):
    assert run_all.main(["--list"]) == 0
    commands = capsys.readouterr().out.splitlines()
    modules = [command.split()[2] for command in commands]
    assert all(command.startswith("python -m benchmarks.") for command in commands)
    names = {module.removeprefix("benchmarks.") for module in modules}
    parts = {
        "common", "__init__", "replay", "soak_operations", "soak_groups", "thread_pool", "loop_time", "throughput", "run_all",
        "render_docs", "acceptance", "gpu_bundle",
    }  # fmt: skip
    files = {
        ".".join(path.relative_to(BENCHMARKS).with_suffix("").parts) for path in BENCHMARKS.glob("**/*.py")
    }
    assert names == {name for name in files if not parts & set(name.split("."))}
    assert set(run_all.ARGUMENTS) <= names
    for module, command in zip(modules, commands, strict=True):
        text = BENCHMARKS.parent.joinpath(*module.split(".")).with_suffix(".py").read_text()
        for flag in (word for word in command.split() if word.startswith("--")):
            assert flag in text, (command, flag)


def test_unknown_names_are_refused(package: Path, capsys):
    with pytest.raises(SystemExit) as left:
        run_all.main(["--only", "fast"], package)
    assert left.value.code == 2
    assert "invalid choice: 'fast'" in capsys.readouterr().err
