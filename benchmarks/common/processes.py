"""Processor time and memory of the processes that a benchmark runs."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Mapping

import psutil

SERVER_ROLES = (
    "scheduler",
    "detokenizer",
)  # as SGLang titles its processes; the main one serves HTTP and tokenizes


def cpu_seconds(server_pid: int) -> dict[str, float]:
    """CPU seconds so far of this process (`client`) and of a server's: `http`, `scheduler`, `detokenizer`, `other`.

    Args:
        server_pid: The main process of the server.
    """
    seconds = dict.fromkeys(("client", "http", *SERVER_ROLES, "other"), 0.0)
    client, server = psutil.Process(), psutil.Process(server_pid)
    for process in (client, server, *server.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds[_role(process, client, server)] += times.user + times.system
    return seconds


def _role(process: psutil.Process, client: psutil.Process, server: psutil.Process) -> str:
    if process in (client, server):
        return "client" if process == client else "http"
    title = " ".join(process.cmdline())
    return next((role for role in SERVER_ROLES if role in title), "other")


@contextlib.contextmanager
def cpu_spent(server_pid: int) -> Iterator[Mapping[str, float]]:
    """Yield a mapping that has the CPU seconds of each process within the block, once the block has ended."""
    spent: dict[str, float] = {}
    before = cpu_seconds(server_pid)
    yield spent
    after = cpu_seconds(server_pid)
    spent.update({role: round(after[role] - before[role], 2) for role in after})
    spent["total"] = round(sum(spent.values()), 2)


def peak_rss_mb() -> float:
    """Peak memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
