"""Drills with full disks and read-only folders: one clear error, whole lines only, and a run that can be resumed."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.server.launch.launcher import Server
from tests.runtime.test_loop import FORK, scripted
from tests.support.drills import (
    WITHOUT_ROOT_RIGHTS,
    error_lines,
    file_size_limit,
    nothing_left,
    read_only_mount,
    resize_disk,
    run_command,
    small_disk,
)

PROBLEMS = {f"p{i}": f"Problem {i}: " for i in range(60)}
BUDGET = apr.Budget(tokens=150, width=3, branch_tokens=12, outline_chars=8)
REPLIES = {"branch_1": " one\n</Thread>", "branch_2": " two\n</Thread>", "after": "</Parallel>\n\nDone."}


def batch(url: str, path: Path, **options: object) -> apr.Outcomes:
    return apr.run_many(
        url, PROBLEMS, path, concurrency=20, mode="parallel", temperature=1.0, budget=BUDGET, **options
    )


def check_whole_lines(path: Path) -> set[str]:
    """Every line of the file is a trajectory. Returns the ids."""
    assert path.read_bytes().endswith(b"\n")
    names = [name for name, _ in apr.read_many(path)]
    assert len(names) == len(set(names))
    return set(names)


# Quick: without a server


def test_a_scripted_batch_on_a_full_disk_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    engine = scripted(trunk="Think. " + FORK, **REPLIES)
    problems = {name: f"{name}: Q: " for name in PROBLEMS}
    with file_size_limit(40_000), pytest.raises(apr.AprError, match="a line could not be written"):
        asyncio.run(apr.arun_many(engine, problems, path, concurrency=8))
    before = path.read_bytes()
    names = check_whole_lines(path)
    assert 0 < len(names) < len(problems)
    assert engine.active == set(), "no request is left"
    outcomes = asyncio.run(apr.arun_many(engine, problems, path))
    assert set(outcomes.skipped) == names
    assert path.read_bytes().startswith(before)
    assert check_whole_lines(path) == set(problems)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of trajectories."""
    path = tmp_path_factory.mktemp("traces") / "out.jsonl"
    trajectory = apr.dialect("threadweaver").parse("six times seven is 42", apr.ByteTokenizer()).to_json()
    path.write_text(f'{{"id": "a", "trajectory": {trajectory}}}\n')
    return path


def commands(traces: Path, folder: Path) -> dict[str, list[str]]:
    """Commands that write to a folder. None of them gets as far as a server."""
    config = traces.parent / "config.toml"
    config.write_text("[data]\nproblems = 20\nnumbers = [2]\n[steps]\ntokens = 100\n")
    url = "http://127.0.0.1:9"
    return {
        "eval": ["eval", "countdown", "--url", url, "-o", str(folder)],
        "eval, new folder": ["eval", "countdown", "--url", url, "-o", str(folder / "new")],
        "report": ["report", str(traces), "-o", str(folder / "page.html")],
        "train sft": ["train", "sft", str(config), "-o", str(folder / "run")],
    }


COMMANDS = ("eval", "eval, new folder", "report", "train sft")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("who", ["root", "user"])
def test_a_command_in_a_read_only_folder_is_an_error_of_one_line(
    traces: Path, tmp_path: Path, command: str, who: str
) -> None:
    """For root the file system is read-only, for an ordinary user the folder."""
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    arguments = commands(traces, folder)[command]
    if who == "root":
        with read_only_mount(folder):
            status, output, errors, took = run_command(arguments)
    else:
        status, output, errors, took = run_command(arguments, prefix=WITHOUT_ROOT_RIGHTS)
    (line,) = error_lines(errors)
    assert (status, output) == (1, "")
    assert "read-only" in line
    assert ("Read-only file system" if who == "root" else "Permission denied") in line
    assert took < 60
    assert list(folder.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_a_full_disk_is_an_error_of_one_line(traces: Path, tmp_path: Path, command: str) -> None:
    with small_disk(tmp_path / "disk", "16k") as disk:
        (disk / "fill").write_bytes(bytes(shutil.disk_usage(disk).free))
        assert shutil.disk_usage(disk).free == 0
        status, output, errors, _ = run_command(commands(traces, disk)[command])
        (line,) = error_lines(errors)
        assert (status, output) == (1, "")
        assert "No space left on device" in line
        left = {path.name for path in disk.rglob("*") if path.is_file() and path.stat().st_size}
        assert left == {"fill"}, "no file holds half of something"


# On a real server


@pytest.mark.slow
@pytest.mark.server
def test_a_batch_on_a_full_disk_is_resumed(server: Server, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "128k") as disk:
        path = disk / "out.jsonl"
        with pytest.raises(apr.AprError, match=r"a line could not be written.*No space left on device"):
            batch(server.url, path)
        before = path.read_bytes()
        names = check_whole_lines(path)
        assert 0 < len(names) < len(PROBLEMS)
        resize_disk(disk, "8m")
        outcomes = batch(server.url, path)
        assert set(outcomes.skipped) == names
        assert (len(outcomes.finished), outcomes.failed) == (len(PROBLEMS) - len(names), {})
        assert path.read_bytes().startswith(before)
        assert check_whole_lines(path) == set(PROBLEMS)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(3000)  # it ends where nothing is written for two minutes
def test_an_evaluation_on_a_full_disk_is_resumed(solver: Server, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "128k") as disk:
        command = [
            "eval",
            "countdown",
            "--url",
            solver.url,
            "--limit",
            "60",
            "--at-once",
            "12",
            "-o",
            str(disk / "out"),
        ]
        path = disk / "out" / "run.jsonl"
        status, _, errors, _ = run_command(command, progress=path)
        (line,) = error_lines(errors)
        assert status == 1
        assert "No space left on device" in line
        before = path.read_bytes()
        assert before.endswith(b"\n")
        resize_disk(disk, "16m")
        status, _, errors, _ = run_command(command, progress=path)
        assert (status, error_lines(errors)) == (0, [])
        after = path.read_bytes()
        assert after.startswith(before)
        assert after.count(b"\n") == 61


@pytest.mark.slow
@pytest.mark.server
def test_a_server_whose_log_is_on_a_full_disk_answers(
    forked_server: type[Server], untagged: Path, tmp_path: Path
) -> None:
    options = {"max_total_tokens": 4096, "context_length": 1024}
    with (
        small_disk(tmp_path / "disk", "4k") as disk,
        forked_server(untagged, log_path=disk / "log", **options) as server,
        nothing_left(server),
    ):
        for _ in range(3):
            assert apr.run(server.url, "Q: ", mode="sequential", budget=apr.Budget(tokens=20)).text
        assert shutil.disk_usage(disk).free < 4096
        server.stop()
