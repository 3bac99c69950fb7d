"""Starts, watches and stops the processes of one server.

The main process of the server leads a session of its own. So Ctrl-C in this process does not reach the server, and
killing the server's process group does not reach this process. A socket is the server's standard input: this process
sends the server's secrets through it, the server sends its one message, and it ends when this process ends.
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
from sgl_apr.server.launch.secret_options import public_environment, take_secrets
from sgl_apr.server.launch.server_folder import ServerFolder
from sgl_apr.server.launch.usage import UsageError
from sgl_apr.views.printable import printable

STOP_GRACE_S = 15.0  # seconds that a server has to stop, before it is killed
LOG_TAIL_LINES = 500  # lines that are searched for the reason of a failure
_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b.*")
_OWN_ERROR = re.compile(r"sgl-apr: error: (.*)")
_BIND_ERROR = re.compile(r"^.*ERROR: +(\[Errno \d+\] error while attempting to bind .*)")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_SECONDARY_ERRORS = (
    "Rank 0 scheduler",
    "EOFError",
)  # what a parent logs about a child that failed and logged the reason


@dataclass(frozen=True, slots=True)
class ReadyMessage:
    """The message of a server that is ready.

    Attributes:
        url: Where it listens.
        device: Where the model runs.
        attention: Its attention backend, and why on a GPU.
        warning: What its operator should know, or nothing.
    """

    url: str
    device: str
    attention: str
    warning: str = ""


class ServerProcess:
    """A running server. Making one starts it.

    Args:
        argv: Flags of the server. Secrets among them do not get onto its command line.
        environment: Environment variables on top of those of this process.
        sink: Receives the server's output, which goes nowhere else.
        popen: Starts the process.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        sink: BinaryIO,
        popen: Callable[..., Any] = subprocess.Popen,
    ) -> None:
        public, secrets = take_secrets(argv)
        self._link, child_end = socket.socketpair()
        self._folder = ServerFolder()
        command = [sys.executable, "-P", "-m", "sgl_apr.server.launch.main", *public]
        try:
            with child_end:
                self._link.sendall(json.dumps(secrets).encode() + b"\n")
                self._child: subprocess.Popen[bytes] = popen(
                    command,
                    stdin=child_end.fileno(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=SERVER_ENVIRONMENT
                    | public_environment(os.environ)
                    | self._folder.environment
                    | {"PYTHONUNBUFFERED": "1", LAUNCHED_ENV: "1"}
                    | dict(environment),
                )
        except BaseException:
            self._link.close()
            self._folder.remove()
            raise
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
        """Block until the server is ready.

        Args:
            timeout: Seconds to wait.
            on_wait: Called about once a second with the seconds so far.

        Raises:
            UsageError: The server rejected its flags.
            LaunchError: The server failed to start, or was not ready in time.
        """
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
        """Block until the server has ended, and return why it ended, if its log shows the reason."""
        self._child.wait()
        return self._exit_reason()

    def stop(self, grace: float = STOP_GRACE_S) -> None:
        """Ask the server to stop, and kill all its processes that are left after `grace` seconds."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self._child.send_signal(signal.SIGTERM)
            self._child.wait(grace)
        self.kill()

    def kill(self) -> None:
        """Kill all processes of the server, and remove its temporary files."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._link.close()
        self._pump.join(5.0)
        if not self._pump.is_alive() and self._child.stdout is not None:
            self._child.stdout.close()
        self._folder.remove()

    def _copy_output(self, sink: BinaryIO) -> None:
        output = self._child.stdout
        assert output is not None
        for line in output:
            self._lines.append(text := clean_log_line(line))
            if match := _BIND_ERROR.search(text):
                # SGLang does not end then: its warm-up sends requests to the process that has the port.
                self._bind_failure = f"the server cannot listen: {match[1]}"
            with contextlib.suppress(OSError, ValueError):  # a closed sink must not block the server
                sink.write(text.encode() + b"\n")
                sink.flush()

    def _exit_reason(self) -> str:
        self._child.wait()
        self._pump.join(5.0)
        return failure_reason(self._lines) or f"the server died with status {self._child.returncode}"


def clean_log_line(line: bytes) -> str:
    """Return a line of a server's log without anything that a terminal obeys.

    SGLang writes texts of clients into its log, such as the names of sessions.

    Examples:
        >>> clean_log_line(b"\\x1b[31mOpened: a\\x1b]52;c;cHduZWQ=\\x07\\n")
        'Opened: a]52;c;cHduZWQ='
    """
    text = _COLOR.sub("", line.decode(errors="replace")).rstrip()
    return printable(text).replace("\n", " ")


def failure_reason(lines: Sequence[str]) -> str | None:
    """Return the line of a log that best explains why a process ended, or None.

    That is the error that this package reports, else the last exception, without those that a parent logs about a
    child.
    """
    for line in reversed(lines):
        if match := _OWN_ERROR.search(line):
            return match[1]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    primary = [line for line in exceptions if not any(text in line for text in _SECONDARY_ERRORS)]
    return next(reversed(primary or exceptions), None)
