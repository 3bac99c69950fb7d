"""Starting SGLang as this package needs it: from the shell with `serve`, from Python with `Server`."""

from __future__ import annotations

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
from sgl_apr.server.launch.process import ServerProcess
from sgl_apr.server.launch.usage import UsageError

STARTUP_TIMEOUT_S = 1800.0  # seconds until ready: a large model may be downloaded and loaded in that time
PROGRESS_INTERVAL_S = 30.0

HELP = """\
usage: sgl-apr serve --model MODEL [any flag of SGLang's server]

Serves a model with SGLang for adaptive parallel reasoning. MODEL is a directory or a Hugging Face id.

  sgl-apr serve --model ./my-model
  sgl-apr serve --model Qwen/Qwen3-8B --port 8000 --context-length 32768
  sgl-apr serve --model ./my-model --max-total-tokens 8192      # a smaller KV cache

When the server is ready, one line with its URL goes to standard output; all else goes to standard error.
Ctrl-C or SIGTERM stops it. Status: 0 after a stop, 2 for wrong flags, 1 for anything else.

Defaults, which every flag you give overrides:
  everywhere      --grammar-backend llguidance --schedule-policy lpm
                  --radix-cache-backend apr, which joins branches in the KV cache, where that works, and one
                  line that says why not where it does not; --radix-cache-backend stock is SGLang's own
  with a GPU      --attention-backend flashinfer --page-size 1; triton for a model whose heads are
                  no multiple of 64 dimensions
  without one     --device cpu --attention-backend apr_cpu --dtype float32 --max-total-tokens 32768
                  --sampling-backend pytorch --sleep-on-idle, no CUDA graphs

What requests to this server's own trajectories (`apr` in an OpenAI body, /apr/generate) may ask for at most;
one that asks for more is refused, one that does not say gets no more:
  --apr-max-width N, --apr-max-depth N      branches of a fork, nesting of forks
  --apr-max-tokens N, --apr-max-seconds S   tokens and wall time of one trajectory
  --apr-max-concurrent N                    trajectories at once (256); one more is answered 503

python -m sglang.launch_server --help lists SGLang's flags.
"""


class Server:
    """A server for the time of a `with` block, or from `start` to `stop`.

    >>> with Server("./my-model", context_length=4096) as server:  # doctest: +SKIP
    ...     sgl.set_default_backend(apr.Endpoint(server.url))

    Further keyword arguments are SGLang's flags: `context_length=4096` is `--context-length 4096`,
    `disable_radix_cache=True` is `--disable-radix-cache`. Without a `port` a free one is taken. The log goes
    to `log_path`, else to a temporary file that is kept if the server fails.
    """

    popen: Callable[..., Any] = staticmethod(subprocess.Popen)  # how its first process begins

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
        own = {"model": model, "port": preflight.free_port(host) if port is None else port}
        self._argv = as_flags(own | sglang_flags)
        self._timeout = startup_timeout
        self._log_path = log_path
        self._url = ""
        self._running: tuple[ServerProcess, BinaryIO] | None = None

    @property
    def url(self) -> str:
        return self._url

    @property
    def pid(self) -> int:
        """Of the server's main process, which leads a session with all the others."""
        if self._running is None:
            raise LaunchError("the server is not running")
        return self._running[0].pid

    def start(self) -> Self:
        """Blocks until the server is ready; raises LaunchError, and leaves nothing behind then."""
        wanted = preflight.read_arguments(self._argv)
        environment = preflight.check_launch(wanted)
        held, log = preflight.reserve_port(wanted), self._open_log()
        process = ServerProcess(self._argv, environment, log, self.popen)
        self._running = process, log
        try:
            with held:
                self._url = process.wait_ready(self._timeout, _Progress(log.name)).url
        except BaseException as error:
            process.kill()
            log.close()
            self._running = None
            if isinstance(error, LaunchError):
                raise LaunchError(f"{error} (log: {log.name})") from None
            raise
        return self

    def stop(self) -> None:
        """Stops every process of the server. Does nothing if it does not run."""
        if self._running is None:
            return
        process, log = self._running
        self._running = None
        process.stop()
        log.close()
        if self._log_path is None:
            Path(log.name).unlink(missing_ok=True)

    def _open_log(self) -> BinaryIO:
        if self._log_path is not None:
            return self._log_path.open("ab")
        descriptor, path = tempfile.mkstemp(prefix="sgl-apr-", suffix=".log")
        os.close(descriptor)
        return Path(path).open("ab")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def serve(argv: Sequence[str]) -> int:
    """What `sgl-apr serve` does, in the foreground of the main thread; returns the exit status."""
    if {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return 0
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _serve(argv, sys.stderr.buffer)
    except _Stopped:
        return 0
    except LaunchError as error:
        print(f"sgl-apr: error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _serve(argv: Sequence[str], log: BinaryIO) -> NoReturn:
    wanted = preflight.read_arguments(argv)
    environment = preflight.check_launch(wanted)
    held = preflight.reserve_port(wanted)
    process = ServerProcess(argv, environment, log)
    try:
        with held:
            ready = process.wait_ready(STARTUP_TIMEOUT_S)
        model = wanted.model or "of the configuration file"
        line = f"sgl-apr ready: {ready.url} (model {model}, {ready.device}, {ready.attention})"
        print(line, flush=True)
        raise LaunchError(f"the server stopped by itself: {process.wait()}")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # who asks again does not want to wait
            signal.signal(number, lambda *_: process.kill())
        process.stop()


class _Stopped(BaseException):
    """SIGINT or SIGTERM came."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


class _Progress:
    """Says on standard error, now and then, that a server is still starting."""

    def __init__(self, log: str) -> None:
        self._log = log
        self._next = PROGRESS_INTERVAL_S

    def __call__(self, waited: float) -> None:
        if waited >= self._next:
            self._next += PROGRESS_INTERVAL_S
            print(f"sgl-apr: the server is starting, {waited:.0f} s (log: {self._log})", file=sys.stderr)
