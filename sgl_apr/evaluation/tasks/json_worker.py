"""A program of this package in a process of its own that answers lines of JSON, and can be ended; it knows no question."""

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
    """Runs a module, begun when it is first asked, and anew where it was ended. seconds: until an answer is given up.

    The module says a line when it is ready, and then one for each that it reads.
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
        """What a function there says; None if it does not come to an end, or needs too much memory."""
        with self._lock:
            process = self._running()
            assert process.stdin
            try:
                process.stdin.write(json.dumps([name, *arguments]) + "\n")
                process.stdin.flush()
                return json.loads(self._line(process, timeout_s or self.timeout_s) or "null")
            except BaseException as error:  # an answer that was not read would be taken for the next one
                self.close()
                if isinstance(error, BrokenPipeError):
                    return None
                raise

    def close(self) -> None:
        """End it."""
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
        """Its next line; empty, and it is ended, if none comes."""
        assert process.stdout
        heard = poll()  # not `select`: hundreds of requests have descriptors too large for that
        heard.register(process.stdout, POLLIN)
        line = process.stdout.readline() if heard.poll(1000 * seconds) else ""
        if not line:
            self.close()
        return line
