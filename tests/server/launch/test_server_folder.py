"""The folder of a server is removed in every way of ending, and no folder that is in use."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from sgl_apr.server.launch import server_folder
from sgl_apr.server.launch.server_folder import PREFIX, ServerFolder


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(server_folder, "_base_folder", lambda: tmp_path)
    monkeypatch.setattr(server_folder, "OUTSIDE", (tmp_path / "shm",))
    (tmp_path / "shm").mkdir()
    return tmp_path


def contents(base: Path) -> list[str]:
    return sorted(path.name for path in base.iterdir() if path.name != "shm")


def test_a_folder_is_removed_with_the_segments_named_after_it(base: Path):
    folder = ServerFolder()
    (folder.path / "socket").touch()
    own = base / "shm" / f"sglang_loads_{folder.path.name}-1_2.shm"
    other = base / "shm" / "sglang_loads_other.shm"
    own.touch()
    other.touch()
    assert contents(base) == [folder.path.name]
    folder.remove()
    folder.remove()
    assert contents(base) == []
    assert list((base / "shm").iterdir()) == [other]


def test_the_next_launch_removes_abandoned_folders_only(base: Path):
    used = ServerFolder()
    abandoned = ServerFolder()
    assert abandoned._lock is not None
    os.close(abandoned._lock)  # as when all its processes were killed
    abandoned._lock = None
    (base / f"{PREFIX}without-a-lock").mkdir()
    third = ServerFolder()
    assert contents(base) == sorted([used.path.name, third.path.name, f"{PREFIX}without-a-lock"])
    used.remove()
    third.remove()


def test_sglangs_sockets_are_in_the_folder(base: Path, monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import PortArgs, ServerArgs

    load_plugins()
    monkeypatch.delenv(server_folder.FOLDER_ENV, raising=False)
    before = tempfile.gettempdir()
    folder = ServerFolder()
    with folder.used_by_this_process():
        ports = PortArgs.init_new(ServerArgs(model_path="dummy"))
        assert tempfile.gettempdir() == before
    names = (
        ports.tokenizer_ipc_name,
        ports.scheduler_input_ipc_name,
        ports.rpc_ipc_name,
        ports.metrics_ipc_name,
    )
    assert {Path(name.removeprefix("ipc://")).parent for name in names} == {folder.path}
    assert ports.instance_id.startswith(folder.path.name)
    assert server_folder.this_servers_folder() is None
    folder.remove()


def test_metrics_are_kept_in_the_folder_unless_the_environment_names_another(
    base: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(server_folder.METRICS_ENV, "")  # which restores it after the test
    monkeypatch.delenv(server_folder.METRICS_ENV)
    folder = ServerFolder()
    server_folder.keep_metrics_in(folder.path)
    metrics = Path(os.environ[server_folder.METRICS_ENV])
    assert metrics.parent == folder.path
    (metrics / "counter_1.db").touch()
    folder.remove()
    assert contents(base) == []
    monkeypatch.setenv(server_folder.METRICS_ENV, "/another")
    server_folder.keep_metrics_in(folder.path)
    assert os.environ[server_folder.METRICS_ENV] == "/another"


def test_an_engine_of_this_process_keeps_its_metrics_in_its_folder(
    base: Path, monkeypatch: pytest.MonkeyPatch
):
    """So they are removed with it, also by the next start if the process was killed."""
    monkeypatch.setenv(server_folder.METRICS_ENV, "")  # which restores it after the test
    monkeypatch.delenv(server_folder.METRICS_ENV)
    without = ServerFolder()
    with without.used_by_this_process():
        assert server_folder.METRICS_ENV not in os.environ
    first = ServerFolder()
    with first.used_by_this_process(metrics=True):
        pass
    metrics = Path(os.environ[server_folder.METRICS_ENV])
    assert metrics.parent == first.path, "the engine still makes files there while it runs"
    first.remove()
    assert server_folder.METRICS_ENV not in os.environ, "the next engine gets a folder of its own"
    monkeypatch.setenv(server_folder.METRICS_ENV, "/another")
    second = ServerFolder()
    with second.used_by_this_process(metrics=True):
        pass
    second.remove()
    assert os.environ[server_folder.METRICS_ENV] == "/another"


def test_a_long_temporary_folder_is_not_used_for_sockets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 90)
    assert server_folder._base_folder() == Path("/tmp")
