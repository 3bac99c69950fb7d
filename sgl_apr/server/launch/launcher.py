"""Starts SGLang servers: `serve` for the command line, `Server` for Python."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, BinaryIO, NoReturn, Self

from sgl_apr.errors import LaunchError
from sgl_apr.server.launch import preflight
from sgl_apr.server.launch.defaults import as_flags
from sgl_apr.server.launch.help import help_text
from sgl_apr.server.launch.process import ReadyMessage, ServerProcess
from sgl_apr.server.launch.secret_options import hide_secrets_of_command_line, take_secrets
from sgl_apr.server.launch.usage import UsageError
from sgl_apr.views.printable import printable

STARTUP_TIMEOUT_S = 1800.0  # seconds until ready: a large model may be downloaded and loaded in that time
PROGRESS_INTERVAL_S = 30.0
INTERRUPTED = 130  # the exit status after Ctrl-C, as shells have it


class Server:
    """A server that runs inside a `with` block, or from `start` to `stop`.

    Examples:
        >>> with Server("./my-model", context_length=4096) as server:  # doctest: +SKIP
        ...     sgl.set_default_backend(apr.Endpoint(server.url))

    Args:
        model: A directory or a Hugging Face id.
        port: The port to listen on. None takes a free one.
        log_path: Where the log goes. None writes a temporary file, which is kept if the server fails.
        startup_timeout: Seconds until the server has to be ready.
        **sglang_flags: SGLang's flags: `context_length=4096` is `--context-length 4096`,
            `disable_radix_cache=True` is `--disable-radix-cache`.
    """

    popen: Callable[..., Any] = staticmethod(subprocess.Popen)  # starts the main process

    def __init__(
        self,
        model: str | Path,
        port: int | None = None,
        *,
        log_path: Path | None = None,
        startup_timeout: float = STARTUP_TIMEOUT_S,
        **sglang_flags: object,
    ) -> None:
        host = str(sglang_flags.get("host", "127.0.0.1"))
        own_flags = {"model": model, "port": preflight.free_port(host) if port is None else port}
        self._argv = as_flags(own_flags | sglang_flags)
        self._timeout = startup_timeout
        self._log_path = log_path
        self._url = ""
        self._running: tuple[ServerProcess, BinaryIO] | None = None

    @property
    def url(self) -> str:
        return self._url

    @property
    def pid(self) -> int:
        """The id of the server's main process, which leads the session of all its processes."""
        if self._running is None:
            raise LaunchError("the server is not running")
        return self._running[0].pid

    def start(self) -> Self:
        """Start the server and block until it is ready.

        Raises:
            LaunchError: The server did not start. None of its processes is left.
        """
        request = preflight.read_arguments(self._argv)
        take_secrets(self._argv)  # so that a mistake is reported before anything is started
        environment = preflight.check_launch(request)
        reserved, log = preflight.reserve_port(request), self._open_log()
        process = ServerProcess(self._argv, environment, log, self.popen)
        self._running = process, log
        try:
            with reserved:
                ready = process.wait_ready(self._timeout, _Progress(log.name))
            self._url = ready.url
            _print_warning(ready)
        except BaseException as error:
            process.kill()
            _close_log(log)
            self._running = None
            if isinstance(error, LaunchError):
                raise LaunchError(f"{error} (log: {log.name})") from None
            raise
        return self

    def stop(self) -> None:
        """Stop all processes of the server. Does nothing if it is not running."""
        if self._running is None:
            return
        process, log = self._running
        self._running = None
        process.stop()
        _close_log(log)
        if self._log_path is None:
            Path(log.name).unlink(missing_ok=True)

    def _open_log(self) -> BinaryIO:
        if self._log_path is not None:
            try:
                return self._log_path.open("ab")
            except OSError as error:
                raise LaunchError(f"cannot write the log {self._log_path}: {error.strerror}") from None
        descriptor, path = tempfile.mkstemp(prefix="sgl-apr-", suffix=".log")
        os.close(descriptor)
        return Path(path).open("ab")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _close_log(log: BinaryIO) -> None:
    """Close a log. What a full disk did not take is lost, and stops neither the server nor its end."""
    with contextlib.suppress(OSError):
        log.close()


def serve(argv: Sequence[str]) -> int:
    """Run `sgl-apr serve` in the main thread.

    Args:
        argv: The arguments after `serve`.

    Returns:
        The exit status.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(), end="")
        return 0
    hide_secrets_of_command_line()
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _serve(argv, sys.stderr.buffer)
    except _Stopped as stopped:
        return stopped.status
    except LaunchError as error:
        print(f"sgl-apr: error: {printable(str(error))}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _serve(argv: Sequence[str], log: BinaryIO) -> NoReturn:
    request = preflight.read_arguments(argv)
    take_secrets(argv)
    environment = preflight.check_launch(request)
    reserved = preflight.reserve_port(request)
    process = ServerProcess(argv, environment, log)
    try:
        with reserved:
            ready = process.wait_ready(STARTUP_TIMEOUT_S)
        signal.signal(signal.SIGINT, _stop_ready)
        _print_warning(ready)
        model = request.model or "of the configuration file"
        line = f"sgl-apr ready: {ready.url} (model {model}, {ready.device}, {ready.attention})"
        print(line, flush=True)
        raise LaunchError(f"the server stopped by itself: {process.wait()}")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second signal kills the server at once
            signal.signal(number, lambda *_: process.kill())
        process.stop()


def _print_warning(ready: ReadyMessage) -> None:
    if ready.warning:
        print(f"sgl-apr: warning: {ready.warning}", file=sys.stderr, flush=True)


class _Stopped(BaseException):
    """SIGINT or SIGTERM was received.

    Attributes:
        status: The exit status.
    """

    def __init__(self, status: int) -> None:
        self.status = status


def _stop(number: int, frame: FrameType | None) -> None:
    """Stop a server that starts. Ctrl-C is then an interruption, and SIGTERM the ordinary way to stop."""
    raise _Stopped(INTERRUPTED if number == signal.SIGINT else 0)


def _stop_ready(number: int, frame: FrameType | None) -> None:
    """Stop a server that is ready."""
    raise _Stopped(0)


class _Progress:
    """Prints to standard error, every `PROGRESS_INTERVAL_S`, that a server is still starting."""

    def __init__(self, log: str) -> None:
        self._log = log
        self._next = PROGRESS_INTERVAL_S

    def __call__(self, waited: float) -> None:
        if waited >= self._next:
            self._next += PROGRESS_INTERVAL_S
            print(f"sgl-apr: the server is starting, {waited:.0f} s (log: {self._log})", file=sys.stderr)
