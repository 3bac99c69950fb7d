"""Starts servers as forks of one process that has imported SGLang, which saves half a minute of imports each time.

The servers use no GPU, because the state of a GPU does not survive a fork, and because the tests compare results in
single precision, for which SGLang has no kernels on a GPU. The tests in `launch` and `gpu` start servers as users do.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

from sgl_apr.server.constants import GENERATED_SECRET_ENV, LAUNCHED_ENV
from sgl_apr.server.launch.defaults import SERVER_ENVIRONMENT
from sgl_apr.server.launch.fast_imports import fast_imports

MAX_MESSAGE_BYTES = 1 << 20
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def cores_per_worker() -> int | None:
    """Return how many cores this process and its servers have if there are several pytest workers, else None."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))
    return max(1, len(os.sched_getaffinity(0)) // processes) if processes else None


class ForkServer:
    """The process that forks. It imports SGLang while tests run that need no server yet."""

    def __init__(self) -> None:
        self._link, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-P", __file__]
        environment = (
            SERVER_ENVIRONMENT | dict(os.environ) | NO_GPU | {"PYTHONUNBUFFERED": "1", LAUNCHED_ENV: "1"}
        )
        if threads := cores_per_worker():
            environment["OMP_NUM_THREADS"] = str(threads)
        with child_end:
            self._process = subprocess.Popen(command, stdin=child_end.fileno(), env=environment)

    def popen(self, command: Sequence[str], *, stdin: int, env: Mapping[str, str], **_: Any) -> ForkedProcess:
        """Take the place of `subprocess.Popen` in `ServerProcess`, which always passes the same other options."""
        begin = command.index("sgl_apr.server.launch.main") + 1
        output, child_end = os.pipe()
        message = json.dumps([list(command[begin:]), dict(env) | NO_GPU, os.getcwd()]).encode()
        socket.send_fds(self._link, [message], [stdin, child_end])
        os.close(child_end)
        return ForkedProcess(int(self._link.recv(64)), os.fdopen(output, "rb"))

    def close(self) -> None:
        self._link.close()
        self._process.wait()


class ForkedProcess:
    """Takes the place of a `subprocess.Popen`. The return code is unknown, because the fork server is the parent."""

    returncode = None

    def __init__(self, pid: int, stdout: IO[bytes]) -> None:
        self.pid, self.stdout = pid, stdout
        self._process = os.pidfd_open(pid)

    def __del__(self) -> None:
        os.close(self._process)

    def wait(self, timeout: float | None = None) -> None:
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired("a server", timeout or 0.0)

    def send_signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._process, number)


def main() -> None:
    link = socket.socket(fileno=os.dup(0))
    with fast_imports():
        from sglang.srt.plugins import load_plugins

        load_plugins()

        import sgl_apr.server.api.install
        import sgl_apr.server.launch.main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for them
    while True:
        message, descriptors, _, _ = socket.recv_fds(link, MAX_MESSAGE_BYTES, 2)
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
    """Turn this fork into the process that `ServerProcess` would have started."""
    os.setsid()
    for descriptor, number in ((stdin, 0), (stdout, 1), (stdout, 2)):
        os.dup2(descriptor, number)
    os.close(stdin)
    os.close(stdout)
    secret = os.environ[GENERATED_SECRET_ENV]  # the plugin has read it already
    os.environ.clear()
    os.environ.update(environment | {GENERATED_SECRET_ENV: secret})
    tempfile.tempdir = None  # it is read from this environment


if __name__ == "__main__":
    main()
