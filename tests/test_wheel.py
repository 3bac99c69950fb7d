"""The wheel, installed without the checkout: its grammars, its model and its commands."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.threadweaver_traces import TRACE


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution, which were built by what pyproject.toml names."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=250)
    return folder


@pytest.mark.slow
def test_commands_of_an_installed_wheel(built: Path, tmp_path: Path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    (tmp_path / "trace.txt").write_text(TRACE)

    def run(*argv: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "sgl_apr.cli.main", *argv]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version").startswith("sgl-apr ")
    assert "both" in run("parse", "trace.txt")
    assert "<Parallel>" in run("convert", "trace.txt", "--to", "threadweaver")
    assert run("model", "builtin").startswith(str(tmp_path / "installed"))


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_the_source_distribution_has_what_its_tests_read(built: Path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    left_out = {name for name in tracked if name not in names}
    assert {name.partition("/")[0] for name in left_out} <= {".ci", ".gitignore", ".gitattributes"}
