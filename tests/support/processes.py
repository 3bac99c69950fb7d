"""Finds and waits for processes, for tests that check that none are left."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

SERVE = [
    sys.executable,
    "-c",
    "import sys; from sgl_apr.server.launch.launcher import serve; sys.exit(serve(sys.argv[1:]))",
]


def in_session(leader: int) -> set[int]:
    """Return the living processes of a session."""
    processes = set()
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                processes.add(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return processes


def run_delays(pid: int) -> dict[str, float]:
    """Return for how many seconds each thread of a process was ready to run, but waited for a core. Linux counts them."""
    delays = {}
    with suppress(OSError):  # the process has ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # the thread has ended
                delays[thread.name] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return delays


class CoreWait:
    """Measures for how long some processes wait for a core, because other processes of the machine use all of them.

    Args:
        pids: The processes. Each does a part of the work, one after the other.
    """

    def __init__(self, *pids: int) -> None:
        self._before = {pid: run_delays(pid) for pid in pids}

    def seconds(self) -> float:
        """Return the seconds since the start, of the thread of each process that waited longest."""
        return sum(
            max((delay - before.get(thread, 0) for thread, delay in run_delays(pid).items()), default=0.0)
            for pid, before in self._before.items()
        )


def allocated_bytes(pid: int) -> int:
    """Return the memory of a process that is no file, in RAM or swapped out."""
    status = Path(f"/proc/{pid}/status").read_text()
    return (
        sum(
            int(kilobytes)
            for kilobytes in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB", status, re.MULTILINE)
        )
        * 1024
    )


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.1)
