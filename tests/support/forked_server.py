"""Servers as forks of one process that has imported SGLang: the same code, without half a minute of imports each.

They see no GPU: no fork keeps the state of one, and what they say is compared in single precision, for which SGLang has no
kernels there. `test_server` and `test_launch` start theirs as users do, and so does `test_gpu_server`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from sgl_apr.server.constants import CACHE_SECRET_ENV, LAUNCHED_ENV
from sgl_apr.server.launch.defaults import SERVER_ENVIRONMENT

LIMIT = 1 << 20  # bytes of a message
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


def share() -> int | None:
    """How many cores this process and its servers have, if tests run in several."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))
    return max(1, len(os.sched_getaffinity(0)) // processes) if processes else None


class Nursery:
    """The process that forks; it imports while the tests go on that need no server yet."""

    def __init__(self) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-P", __file__]
        environment = SERVER_ENVIRONMENT | dict(os.environ) | HIDDEN | {"PYTHONUNBUFFERED": "1", LAUNCHED_ENV: "1"}
        if threads := share():
            environment["OMP_NUM_THREADS"] = str(threads)
        with theirs:
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), env=environment)

    def popen(self, command: Sequence[str], *, stdin: int, env: Mapping[str, str], **_: Any) -> Forked:
        """As `subprocess.Popen` for a command of `ServerProcess`, whose other options are always the same."""
        begin = command.index("sgl_apr.server.launch.main") + 1
        ours, theirs = os.pipe()
        message = json.dumps([list(command[begin:]), dict(env) | HIDDEN, os.getcwd()]).encode()
        socket.send_fds(self._link, [message], [stdin, theirs])
        os.close(theirs)
        return Forked(int(self._link.recv(64)), os.fdopen(ours, "rb"))

    def close(self) -> None:
        self._link.close()
        self._process.wait()


class Forked:
    """What a `subprocess.Popen` is to its child; how it ended only the nursery could know."""

    returncode = None

    def __init__(self, pid: int, stdout: IO[bytes]) -> None:
        self.pid, self.stdout = pid, stdout
        self._process = os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> None:
        gone = select.poll()
        gone.register(self._process, select.POLLIN)
        if not gone.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired("a server", timeout or 0.0)

    def send_signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._process, number)


def main() -> None:
    link = socket.socket(fileno=os.dup(0))
    from sglang.srt.plugins import load_plugins

    load_plugins()

    import sgl_apr.server.api.install
    import sgl_apr.server.launch.main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        message, descriptors, _, _ = socket.recv_fds(link, LIMIT, 2)
        if not message:
            return
        if (pid := os.fork()) == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            link.close()
            argv, environment, directory = json.loads(message)
            os.chdir(directory)
            _become(environment, *descriptors)
            sgl_apr.server.launch.main.main(argv)
            os._exit(0)
        link.send(str(pid).encode())
        for descriptor in descriptors:
            os.close(descriptor)


def _become(environment: dict[str, str], stdin: int, stdout: int) -> None:
    """The process that `ServerProcess` would have started."""
    os.setsid()
    for descriptor, number in ((stdin, 0), (stdout, 1), (stdout, 2)):
        os.dup2(descriptor, number)
    os.close(stdin)
    os.close(stdout)
    secret = os.environ[CACHE_SECRET_ENV]  # the plugin has it from here
    os.environ.clear()
    os.environ.update(environment | {CACHE_SECRET_ENV: secret})


if __name__ == "__main__":
    main()
