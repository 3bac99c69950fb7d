"""One server process and everything below it: start, wait, stop; what it serves is not known here.

The child leads a session of its own, so that neither a Ctrl-C meant for us reaches it nor a kill of its group
reaches us. The socket that is its standard input carries its one message, and ends when we end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from sgl_apr.errors import LaunchError
from sgl_apr.server.constants import LAUNCHED_ENV
from sgl_apr.server.launch.defaults import SERVER_ENVIRONMENT
from sgl_apr.server.launch.usage import UsageError

STOP_GRACE_S = 15.0  # seconds to stop in, before everything is killed
LOG_TAIL_LINES = 500  # lines kept for an error message
_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b.*")
_OWN_ERROR = re.compile(r"sgl-apr: error: (.*)")
_BIND_ERROR = re.compile(r"^.*ERROR: +(\[Errno \d+\] error while attempting to bind .*)")
_SECONDARY_ERRORS = (
    "Rank 0 scheduler",
    "EOFError",
)  # how the parent words the death of the child that knew why


@dataclass(frozen=True, slots=True)
class ReadyMessage:
    """What the server said when it was ready."""

    url: str
    device: str
    attention: str


class ServerProcess:
    """Starts at once; `sink` gets the server's output, which goes nowhere else."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        sink: BinaryIO,
        popen: Callable[..., Any] = subprocess.Popen,
    ) -> None:
        self._link, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "sgl_apr.server.launch.main", *argv]
        with theirs:
            self._child: subprocess.Popen[bytes] = popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=SERVER_ENVIRONMENT
                | dict(os.environ)
                | {"PYTHONUNBUFFERED": "1", LAUNCHED_ENV: "1"}
                | dict(environment),
            )
        self._lines: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._bind_failure = ""
        self._pump = threading.Thread(target=self._copy_output, args=(sink,), daemon=True)
        self._pump.start()

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_ready(
        self, timeout: float, on_wait: Callable[[float], None] = lambda seconds: None
    ) -> ReadyMessage:
        """Blocks until the server serves. LaunchError says why it does not; `on_wait` is told of the time."""
        start, received = time.monotonic(), b""
        self._link.settimeout(1.0)
        while not received.endswith(b"\n"):
            if (waited := time.monotonic() - start) > timeout:
                raise LaunchError(f"the server was not ready after {timeout:g} s")
            try:
                chunk = self._link.recv(65536)
            except TimeoutError:
                if self._bind_failure:
                    raise LaunchError(self._bind_failure) from None
                on_wait(waited)
                continue
            if not chunk:
                raise LaunchError(self._exit_reason())
            received += chunk
        message = json.loads(received)
        if "error" in message:
            raise (UsageError if message["usage"] else LaunchError)(message["error"])
        return ReadyMessage(**message)

    def wait(self) -> str:
        """Blocks until the server is gone, and says why as far as it is known."""
        self._child.wait()
        return self._exit_reason()

    def stop(self, grace: float = STOP_GRACE_S) -> None:
        """Asks the server to stop, kills what is left after `grace` seconds, and leaves nothing behind."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self._child.send_signal(signal.SIGTERM)
            self._child.wait(grace)
        self.kill()

    def kill(self) -> None:
        """Ends the whole session at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._link.close()
        self._pump.join(5.0)

    def _copy_output(self, sink: BinaryIO) -> None:
        output = self._child.stdout
        assert output is not None
        for line in output:
            self._lines.append(text := line.decode(errors="replace").rstrip())
            if found := _BIND_ERROR.search(
                text
            ):  # it does not end then: its warm-up asks whoever listens there
                self._bind_failure = f"the server cannot listen: {found[1]}"
            with contextlib.suppress(OSError, ValueError):  # a closed sink must not block the server
                sink.write(line)
                sink.flush()

    def _exit_reason(self) -> str:
        self._child.wait()
        self._pump.join(5.0)
        return failure_reason(self._lines) or f"the server died with status {self._child.returncode}"


def failure_reason(lines: Sequence[str]) -> str | None:
    """The line of a log that says best why a process died: our own word for it, or the last exception."""
    for line in reversed(lines):
        if found := _OWN_ERROR.search(line):
            return found[1]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    telling = [line for line in exceptions if not any(echo in line for echo in _SECONDARY_ERRORS)]
    return next(reversed(telling or exceptions), None)
