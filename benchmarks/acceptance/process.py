"""The process of a configuration, as the process that started it sees it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORT_LIMIT_S = (
    120.0  # until it has imported SGLang: where nothing was compiled to bytecode yet, that takes long
)
START_LIMIT_S = 180.0  # the first start on a machine compiles kernels
PART_LIMIT_S = 90.0
STDERR_LINES = 12
WORKER = "import sys; from benchmarks.acceptance.worker import main; sys.exit(main(*__import__('json').loads(sys.argv[1])))"


class Process:
    """A process that runs the parts of one configuration.

    Args:
        name: The configuration.
        device: "cuda" or "cpu".
        parts: Those to run, without `start`.
        noise: The mean error of ordinary requests, if it is known.
        environment: Additional environment variables.
        folder: A directory for its files.
    """

    def __init__(
        self,
        name: str,
        device: str,
        parts: list[str],
        noise: float | None,
        environment: Mapping[str, str],
        folder: Path,
    ) -> None:
        self.name, self.parts = name, parts
        arguments = json.dumps([name, device, parts, noise, str(folder)])
        self._log = folder / f"{time.monotonic_ns()}.log"
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with self._log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER, arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **environment, "PYTHONPATH": path},
                start_new_session=True,  # so that processes that it starts, such as compilers, end with it
            )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def begin(self) -> None:
        """Let it start the scheduler, once it has imported SGLang."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("begin\n")
            self._process.stdin.flush()

    def lines(self, ends: float) -> Iterator[dict[str, Any]]:
        """Yield the figures of each part, and one more line for a part that hangs or ends the process.

        The process has ended afterwards.

        Args:
            ends: When to stop it, on the monotonic clock.
        """
        part, limit = "start", IMPORT_LIMIT_S
        began, remaining = time.monotonic(), ["start", *self.parts]
        try:
            while remaining:
                deadline = min(began + limit, ends)
                try:
                    line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    self.stop()
                    if deadline == ends:
                        yield {"part": part, "skipped": "no time left", "ok": False}
                    else:
                        yield self._failure(part, f"no result after {limit:.0f} s")
                    return
                began = time.monotonic()
                if line is None:
                    if part in remaining:
                        status = self._process.wait()
                        yield self._failure(part, f"the process ended with {_describe_status(status)}")
                    return
                if "begins" in line:
                    part, limit = line["begins"], PART_LIMIT_S if line["begins"] != "start" else START_LIMIT_S
                elif "part" in line:
                    remaining.remove(line["part"])
                    if "failed" in line:
                        line["last_lines"] = self._last_lines()
                    yield line
        finally:
            self.stop()

    def _failure(self, part: str, why: str) -> dict[str, Any]:
        return {"part": part, "ok": False, "failed": why, "last_lines": self._last_lines()}

    def _last_lines(self) -> list[str]:
        text = self._log.read_text(errors="replace").replace("\r", "\n")
        return [line[:300] for line in text.splitlines() if line.strip()][-STDERR_LINES:]

    def stop(self) -> None:
        """End the process and everything that it has started."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _describe_status(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
