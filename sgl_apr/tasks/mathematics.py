"""Mathematics as methods ask for it; what an answer says is found out by `math-verify`, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from select import select
from threading import Lock
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.tasks.chat import Chat
from sgl_apr.tasks.question import ANSWER, QuestionTask

START_S, LONGEST_S = 120.0, 10.0


class MathTask(QuestionTask):
    """Questions whose answer is a formula: what a reply has in a box, its last formula, or its line "Answer:".

    answers: those that are right, by question, as far as they are known; no method sees them.
    """

    name = "mathematics"
    need = 512
    ends = "Think step by step, and put the answer into \\boxed{}."

    def __init__(
        self, engine: Engine, chat: Chat | None = None, *, answers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(engine, chat)
        self.answers = answers or {}

    def answer(self, text: str) -> str:
        named = ANSWER.findall(text)
        return str(FORMULAS.ask("found", text) or (named[-1] if named else ""))

    def concludes(self, text: str) -> bool:
        return "\\boxed{" in text or super().concludes(text)

    def key(self, answer: str) -> Hashable:
        return Said(answer)

    def verify(self, problem: str, answer: str) -> bool | None:
        right = self.answers.get(problem)
        return None if right is None else Said(right) == Said(answer)


@dataclass(frozen=True, eq=False, slots=True)
class Said:
    """An answer, which equals all that say the same: 0.5 and 1/2, x + 1 and 1 + x."""

    text: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Said) and (self.text == other.text or _equal(self.text, other.text))

    def __hash__(self) -> int:
        return 0  # what says the same may look like anything


class Formulas:
    """The process that runs `sgl_apr.tasks.formulas`, begun when it is first asked, and anew where it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = Lock()

    def ask(self, name: str, *texts: str) -> Any:
        """What a function there says; None if it does not come to an end, or needs too much memory."""
        with self._lock:
            process = self._running()
            assert process.stdin
            try:
                process.stdin.write(json.dumps([name, *texts]) + "\n")
                process.stdin.flush()
                return json.loads(self._line(process, LONGEST_S) or "null")
            except BaseException as error:  # an answer that was not read would be taken for the next one
                self.end()
                if isinstance(error, BrokenPipeError):
                    return None
                raise

    def end(self) -> None:
        """End it."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.end()
            command = [sys.executable, "-m", "sgl_apr.tasks.formulas"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            if not self._line(self._process, START_S):
                raise AprError("the process that reads formulas with math-verify did not start")
        return self._process

    def _line(self, process: subprocess.Popen[str], seconds: float) -> str:
        """Its next line; empty, and it is ended, if none comes."""
        assert process.stdout
        line = process.stdout.readline() if select([process.stdout], [], [], seconds)[0] else ""
        if not line:
            self.end()
        return line


FORMULAS = Formulas()


@lru_cache(maxsize=1 << 14)
def _equal(one: str, other: str) -> bool:
    return bool(FORMULAS.ask("equal", one, other))
