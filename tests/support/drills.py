"""Failures for the failure drills: a killed scheduler, a full disk, a read-only folder, and what a server may leave."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sgl_apr.server.launch.launcher import Server
from tests.support.processes import in_session, until

# Runs a command as a user who may not write where the permissions of a file forbid it, as root may.
WITHOUT_ROOT_RIGHTS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
COMMAND = [sys.executable, "-m", "sgl_apr.cli.main"]
SHARED_FOLDERS = (Path("/tmp"), Path("/dev/shm"))


def scheduler_of(leader: int) -> psutil.Process:
    """Return the scheduler among the processes of a session.

    It names itself. In a forked server it cannot, and is the process besides the first one that has computed most.
    """
    processes = [psutil.Process(pid) for pid in in_session(leader) if pid != leader]
    named = [p for p in processes if "scheduler" in " ".join(p.cmdline())]
    return max(named or processes, key=lambda p: sum(p.cpu_times()[:2]))


@contextmanager
def nothing_left(server: Server) -> Iterator[None]:
    """Check after the block, in which the server stops, that no process, file, segment or open port of it is left."""
    leader = server.pid
    running = server._running
    assert running is not None
    folder = running[0]._folder.path
    port = int(server.url.rpartition(":")[2])
    assert folder.is_dir()
    yield
    until(lambda: not in_session(leader), 10)
    assert not folder.exists()
    assert [p for base in SHARED_FOLDERS for p in base.glob(f"*{folder.name}*")] == []
    assert not [
        c for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == psutil.CONN_LISTEN
    ]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of a given size, such as "64k", mounted at a folder. It needs root."""
    folder.mkdir()
    mount(["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)])
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize_disk(folder: Path, size: str) -> None:
    mount(["-o", f"remount,size={size}", str(folder)])


@contextmanager
def read_only_mount(folder: Path) -> Iterator[None]:
    """Make a folder read-only, for root too. It needs root."""
    mount(["--bind", str(folder), str(folder)])
    try:
        mount(["-o", "remount,ro,bind", str(folder)])
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(arguments: list[str]) -> None:
    """Mount, or skip the test where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


def run_command(
    arguments: list[str], *, prefix: Sequence[str] = (), timeout: float = 120, progress: Path | None = None
) -> tuple[int, str, str, float]:
    """Run `sgl-apr`, and return its status, output and errors, and how many seconds it took.

    Args:
        arguments: Of the command.
        prefix: What it is run by.
        timeout: Seconds after which it is killed.
        progress: A file to which the command writes its results. It is killed only when the file has not grown for
            `timeout` seconds, so a command with much to do may run as long as a busy machine needs.
    """
    begin, size = time.monotonic(), file_size(progress)
    with subprocess.Popen(
        [*prefix, *COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while True:
            try:
                output, errors = process.communicate(timeout=timeout)
                break
            except BaseException as error:
                grown = file_size(progress)
                if not isinstance(error, subprocess.TimeoutExpired) or grown == size:
                    process.kill()
                    raise
                size = grown
    return process.returncode, output, errors, time.monotonic() - begin


def file_size(path: Path | None) -> int:
    """Return the size of a file, 0 if there is none."""
    return path.stat().st_size if path and path.exists() else 0


def error_lines(stderr: str) -> list[str]:
    """Return the lines of an error, without progress bars, and check that there is no traceback."""
    assert "Traceback" not in stderr, stderr
    return [line for line in stderr.splitlines() if line.startswith("sgl-apr: error:")]
