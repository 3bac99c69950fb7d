"""The attempts of an evaluation, and its file: one line per attempt, so that an interrupted run can continue."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.evaluation.metrics import AttemptMetrics, MethodResults
from sgl_apr.trajectory.jsonl import append_line, open_for_append, read_lines
from sgl_apr.trajectory.trajectory import Trajectory

RUN_FILE, SUMMARY_FILE = "run.jsonl", "summary.json"
WRITE_ONLY_FIELDS = ("answer", "trajectory")  # written to the file, but not held in memory


class ResultStore:
    """Attempts by method and by the number of the problem.

    Attributes:
        file: A file descriptor that gets a line for each new attempt, or None.
        attempts: By method, then by problem number.
        seconds: By method, for how long it has run.
    """

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
        """Add one attempt.

        Args:
            method: Name of the method.
            number: Number of the problem.
            measured: Metrics of the attempt.
            seconds: For how long the method had run when the attempt ended.
            answer: The answer, for the file only.
            trajectory: The trajectory, for the file only.
        """
        if self.file is not None:
            line = {"method": method, "number": number, "seconds": round(seconds, 2), **asdict(measured)}
            text = json.dumps({**line, "answer": answer})
            if trajectory is not None:
                text = f'{text[:-1]}, "trajectory": {trajectory.to_json()}}}'
            append_line(self.file, text)
        self._keep(method, number, measured, seconds)

    def results_of(self, method: str) -> MethodResults:
        """The attempts of one method so far, in the order of the problems."""
        attempts = self.attempts.get(method, {})
        ordered = [attempts[number] for number in sorted(attempts)]
        return MethodResults(method, ordered, self.seconds.get(method, 0.0))

    def load(self, path: Path) -> dict[str, Any] | None:
        """Load the attempts of a file that this class wrote.

        Returns:
            The settings that all attempts share; None if the file is empty.

        Raises:
            AprError: If it is another file.
        """
        try:
            lines = read_lines(path)
            _, settings = next(lines, (0, None))
            for _, line in lines:
                method, number, seconds = (line.pop(name) for name in ("method", "number", "seconds"))
                for name in WRITE_ONLY_FIELDS:
                    line.pop(name, None)
                self._keep(method, number, AttemptMetrics(**line), seconds)
        except (AprError, KeyError, TypeError) as error:
            raise AprError(f"{path} was not written by `sgl-apr eval ... -o`: {error!r}") from None
        return settings

    def _keep(self, method: str, number: int, measured: AttemptMetrics, seconds: float) -> None:
        self.attempts.setdefault(method, {})[number] = measured
        self.seconds[method] = max(seconds, self.seconds.get(method, 0.0))


@contextmanager
def open_evaluation(directory: Path | None, settings: Mapping[str, Any]) -> Iterator[ResultStore]:
    """Open the evaluation in a directory, with the attempts that it already has.

    Args:
        directory: Created if needed; None keeps attempts in memory only.
        settings: What all attempts have in common.

    Raises:
        AprError: If the directory holds an evaluation with other settings.
    """
    if directory is None:
        yield ResultStore()
        return
    directory.mkdir(parents=True, exist_ok=True)
    path, expected = directory / RUN_FILE, json.loads(json.dumps(settings))
    with open_for_append(path) as file:
        store = ResultStore(file)
        stored = store.load(path)
        if stored is None:
            append_line(file, json.dumps(expected))
        elif stored != expected:
            raise AprError(f"{path} holds another evaluation: {stored}, expected {expected}")
        yield store


def read_results(directory: Path) -> list[MethodResults]:
    """The methods of the evaluation in a directory.

    Raises:
        AprError: If the directory has no evaluation.
    """
    store = ResultStore()
    store.load(directory / RUN_FILE)
    return [store.results_of(method) for method in store.attempts]
