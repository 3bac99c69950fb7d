"""An evaluation and its file: a line for every attempt as it ends; a run that was interrupted goes on behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.evaluation.metrics import AttemptMetrics, MethodResults
from sgl_apr.trajectory.jsonl import open_for_append
from sgl_apr.trajectory.trajectory import Trajectory

RUN_FILE, SUMMARY_FILE = "run.jsonl", "summary.json"
WRITE_ONLY_FIELDS = ("answer", "trajectory")  # of an attempt, and not kept: there are thousands


class ResultStore:
    """Attempts by method and by the number of the problem; `file` gets a line for each that is added."""

    def __init__(self, file: int | None = None) -> None:
        self.file = file
        self.attempts: dict[str, dict[int, AttemptMetrics]] = {}
        self.seconds: dict[str, float] = {}

    def add(
        self,
        method: str,
        number: int,
        measured: AttemptMetrics,
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

    def results_of(self, method: str) -> MethodResults:
        """What a method has come to so far, in the order of the problems."""
        made = self.attempts.get(method, {})
        return MethodResults(method, [made[number] for number in sorted(made)], self.seconds.get(method, 0.0))

    def load(self, path: Path) -> dict[str, Any] | None:
        """Attempts from such a file, and what all of them have in common; None for an empty one. Raises `AprError`."""
        try:
            with path.open(encoding="utf-8") as file:
                asked = json.loads(next(file, "null"))
                for text in file:
                    line = json.loads(text)
                    method, number, seconds = (line.pop(name) for name in ("method", "number", "seconds"))
                    for name in WRITE_ONLY_FIELDS:
                        line.pop(name, None)
                    self._keep(method, number, AttemptMetrics(**line), seconds)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AprError(f"{path} is no file that `sgl-apr eval ... -o` has written: {error!r}") from None
        found: dict[str, Any] | None = asked
        return found

    def _keep(self, method: str, number: int, measured: AttemptMetrics, seconds: float) -> None:
        self.attempts.setdefault(method, {})[number] = measured
        self.seconds[method] = max(seconds, self.seconds.get(method, 0.0))


@contextmanager
def open_evaluation(directory: Path | None, asked: Mapping[str, Any]) -> Iterator[ResultStore]:
    """The evaluation in a directory, with what is there already; without one it is kept nowhere.

    `asked` is what all attempts have in common. Raises `AprError` if the directory holds those of another.
    """
    if directory is None:
        yield ResultStore()
        return
    directory.mkdir(parents=True, exist_ok=True)
    path, given = directory / RUN_FILE, json.loads(json.dumps(asked))
    with open_for_append(path) as file:
        found = ResultStore(file)
        before = found.load(path)
        if before is None:
            os.write(file, json.dumps(given).encode() + b"\n")
        elif before != given:
            raise AprError(f"{path} is of another evaluation: {before}, expected {given}")
        yield found


def read_results(directory: Path) -> list[MethodResults]:
    """The rows of an evaluation; raises `AprError` for a directory without one."""
    found = ResultStore()
    found.load(directory / RUN_FILE)
    return [found.results_of(method) for method in found.attempts]
