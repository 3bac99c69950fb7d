"""Run a module of this package as a process that answers lines of JSON, with a timeout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from select import POLLIN, poll
from threading import Lock
from typing import Any

from sgl_apr.errors import AprError

START_TIMEOUT_S, ANSWER_TIMEOUT_S = 120.0, 10.0


class JsonWorker:
    """A process that starts on the first call, and restarts after it was ended.

    The module prints one line when it is ready, and then one line for each that it reads.

    Args:
        module: The module to run, by its full name.
        timeout_s: Seconds after which a call is given up.
        environment: Added to the environment of the process.
    """

    def __init__(
        self,
        module: str,
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.module, self.timeout_s, self.environment = module, timeout_s, environment or {}
        self._process: subprocess.Popen[str] | None = None
        self._lock = Lock()

    def call(self, name: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """Call a function of the process.

        Args:
            name: Name of the function.
            *arguments: JSON values.
            timeout_s: Overrides the worker's timeout.

        Returns:
            Its result; None if it does not finish in time or runs out of memory.

        Raises:
            AprError: If the process does not start.
        """
        with self._lock:
            process = self._running()
            assert process.stdin
            try:
                process.stdin.write(json.dumps([name, *arguments]) + "\n")
                process.stdin.flush()
                return json.loads(self._line(process, timeout_s or self.timeout_s) or "null")
            except BaseException as error:  # an answer left unread would be taken for the next one
                self.close()
                if isinstance(error, BrokenPipeError):
                    return None
                raise

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **self.environment},
            )  # fmt: skip
            if not self._line(self._process, START_TIMEOUT_S):
                raise AprError(f"the process that runs {self.module} did not start")
        return self._process

    def _line(self, process: subprocess.Popen[str], seconds: float) -> str:
        """Its next line; if none comes in time, the process is ended and the line is empty."""
        assert process.stdout
        output = (
            poll()
        )  # not `select`, which fails for large descriptors, and hundreds of requests may be open
        output.register(process.stdout, POLLIN)
        line = process.stdout.readline() if output.poll(1000 * seconds) else ""
        if not line:
            self.close()
        return line
