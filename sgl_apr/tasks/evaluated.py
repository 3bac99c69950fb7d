"""An evaluation and its file: a line for every attempt as it ends; a run that was interrupted goes on behind them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from sgl_apr.engine.base import Engine
from sgl_apr.engine.http import HttpEngine
from sgl_apr.engine.serial import OneByOne
from sgl_apr.errors import AprError, BudgetExceeded, GrammarError
from sgl_apr.journal import appending
from sgl_apr.methods.task import Inapplicable
from sgl_apr.tasks.countdown import Problem
from sgl_apr.tasks.evaluation import Measured, Row
from sgl_apr.tasks.solving import Attempt, answer, attempts
from sgl_apr.trajectory import Trajectory

RUN = "run.jsonl"
WRITTEN = ("answer", "trajectory")  # of an attempt, and not kept: there are thousands


class Evaluated:
    """Attempts by method and by the number of the problem; `file` gets a line for each that is added."""

    def __init__(self, file: int | None = None) -> None:
        self.file = file
        self.attempts: dict[str, dict[int, Measured]] = {}
        self.seconds: dict[str, float] = {}

    def add(
        self,
        method: str,
        number: int,
        measured: Measured,
        seconds: float,
        answer: str = "",
        trajectory: Trajectory | None = None,
    ) -> None:
        """One attempt, and for how long its method had been running by then; how it came about is only written."""
        if self.file is not None:
            line = {"method": method, "number": number, "seconds": round(seconds, 2), **asdict(measured)}
            text = json.dumps({**line, "answer": answer})
            if trajectory is not None:
                text = f'{text[:-1]}, "trajectory": {trajectory.to_json()}}}'
            os.write(self.file, text.encode() + b"\n")
        self._keep(method, number, measured, seconds)

    def row(self, method: str) -> Row:
        """What a method has come to so far, in the order of the problems."""
        made = self.attempts.get(method, {})
        return Row(method, [made[number] for number in sorted(made)], self.seconds.get(method, 0.0))

    def load(self, path: Path) -> dict[str, Any] | None:
        """Attempts from such a file, and what all of them have in common; None for an empty one. Raises `AprError`."""
        try:
            with path.open(encoding="utf-8") as file:
                asked = json.loads(next(file, "null"))
                for text in file:
                    line = json.loads(text)
                    method, number, seconds = (line.pop(name) for name in ("method", "number", "seconds"))
                    for name in WRITTEN:
                        line.pop(name, None)
                    self._keep(method, number, Measured(**line), seconds)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AprError(f"{path} is no file that `sgl-apr eval ... -o` has written: {error!r}") from None
        found: dict[str, Any] | None = asked
        return found

    def _keep(self, method: str, number: int, measured: Measured, seconds: float) -> None:
        self.attempts.setdefault(method, {})[number] = measured
        self.seconds[method] = max(seconds, self.seconds.get(method, 0.0))


@contextmanager
def evaluated(directory: Path | None, asked: Mapping[str, Any]) -> Iterator[Evaluated]:
    """The evaluation in a directory, with what is there already; without one it is kept nowhere.

    `asked` is what all attempts have in common. Raises `AprError` if the directory holds those of another.
    """
    if directory is None:
        yield Evaluated()
        return
    directory.mkdir(parents=True, exist_ok=True)
    path, given = directory / RUN, json.loads(json.dumps(asked))
    with appending(path) as file:
        found = Evaluated(file)
        before = found.load(path)
        if before is None:
            os.write(file, json.dumps(given).encode() + b"\n")
        elif before != given:
            raise AprError(f"{path} is of another evaluation: {before}, expected {given}")
        yield found


def read(directory: Path) -> list[Row]:
    """The rows of an evaluation; raises `AprError` for a directory without one."""
    found = Evaluated()
    found.load(directory / RUN)
    return [found.row(method) for method in found.attempts]


async def evaluate(
    url: str,
    problems: Sequence[Problem],
    method: str,
    found: Evaluated,
    *,
    on_attempt: Callable[[], None] = lambda: None,
    **options: Any,
) -> Row:
    """What a server makes of the problems that are not among the attempts of this method yet, and of the others.

    Options are those of `attempts`. A method that cannot be asked has a row that says why.
    """
    done = found.attempts.get(method, {})
    numbers = {problem: number for number, problem in enumerate(problems)}
    left = [problem for problem, number in numbers.items() if number not in done]
    began = time.monotonic() - found.seconds.get(method, 0.0)

    def ended(attempt: Attempt) -> None:
        said = attempt.result.answer if attempt.result else answer(attempt.trajectory)
        number, seconds = numbers[attempt.problem], time.monotonic() - began
        found.add(method, number, Measured.of(attempt), seconds, said, attempt.trajectory)
        on_attempt()

    if left:
        async with await HttpEngine.connect(url, timeout=600) as engine:
            try:
                await attempts(engine, left, None, on_attempt=ended, pacing=None, **options)
            except (Inapplicable, BudgetExceeded, GrammarError) as error:
                return Row(method, (), reason=str(error))
    return found.row(method)


async def alone(url: str, problems: Sequence[Problem], **options: Any) -> tuple[float, float]:
    """Seconds for problems one after another: with all that a method asks at once, and with one request at a time."""
    seconds = list[float]()
    async with await HttpEngine.connect(url, timeout=600) as engine:
        for asked in (engine, cast(Engine, OneByOne(engine))):
            began = time.monotonic()
            await attempts(asked, problems, None, at_once=1, pacing=None, **options)
            seconds.append(time.monotonic() - began)
    return seconds[0], seconds[1]
