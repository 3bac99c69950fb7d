"""Finds and waits for processes, for tests that check that none are left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

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


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.1)
