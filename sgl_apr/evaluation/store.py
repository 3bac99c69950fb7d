"""The attempts of an evaluation, and its file: one line per attempt, so that a run can continue or be extended."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.evaluation.benchmarks.base import CaseKey
from sgl_apr.evaluation.metrics import AttemptMetrics, MethodResults
from sgl_apr.trajectory.jsonl import append_line, file_error, open_for_append, read_lines
from sgl_apr.trajectory.strict_json import read_strictly
from sgl_apr.trajectory.trajectory import Trajectory

RUN_FILE, SUMMARY_FILE = "run.jsonl", "summary.json"
WRITE_ONLY_FIELDS = ("answer", "trajectory")  # written to the file, but not held in memory
# Settings that may differ from those of the runs before: a run continues with what is new.
EXTENSIBLE_SETTINGS = ("limit", "seed", "at_once")


@dataclass(frozen=True, slots=True)
class AttemptLine:
    """Which attempt a line of the file holds.

    Attributes:
        method: Name of the method.
        number: Number of the problem, among those of its seed.
        seconds: For how long the method had run when the attempt ended.
        seed: Seed of the problem. None in a file of an earlier version, whose problems all have the seed of its head.
    """

    method: str
    number: int
    seconds: float
    seed: int | None = None


LINE_FIELDS = tuple(AttemptLine.__dataclass_fields__)


class ResultStore:
    """Attempts by method and by problem.

    Attributes:
        file: A file descriptor that gets a line for each new attempt, or None.
        attempts: By method, then by seed and number of the problem.
        seconds: By method, for how long it has run.
    """

    def __init__(self, file: int | None = None) -> None:
        self.file = file
        self.attempts: dict[str, dict[CaseKey, AttemptMetrics]] = {}
        self.seconds: dict[str, float] = {}

    def add(
        self,
        method: str,
        number: int,
        measured: AttemptMetrics,
        seconds: float,
        answer: str = "",
        trajectory: Trajectory | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Add one attempt.

        Args:
            method: Name of the method.
            number: Number of the problem, among those of its seed.
            measured: Metrics of the attempt.
            seconds: For how long the method had run when the attempt ended.
            answer: The answer, for the file only.
            trajectory: The trajectory, for the file only.
            seed: Seed of the problem.
        """
        if self.file is not None:
            line = AttemptLine(method, number, round(seconds, 2), seed)
            text = json.dumps({**asdict(line), **asdict(measured), "answer": answer})
            if trajectory is not None:
                text = f'{text[:-1]}, "trajectory": {trajectory.to_json()}}}'
            append_line(self.file, text)
        self._keep(method, (seed, number), measured, seconds)

    def results_of(self, method: str, keys: Sequence[CaseKey] | None = None) -> MethodResults:
        """The attempts of one method so far, in the order of the problems.

        Args:
            method: Name of the method.
            keys: Only the attempts at these problems, in this order. By default all, by seed and number.
        """
        attempts = self.attempts.get(method, {})
        ordered = [attempts[key] for key in (sorted(attempts) if keys is None else keys) if key in attempts]
        return MethodResults(method, ordered, self.seconds.get(method, 0.0))

    def load(self, path: Path) -> dict[str, Any] | None:
        """Load the attempts of a file that this class wrote.

        Returns:
            The settings of the first run; None if the file is empty.

        Raises:
            AprError: If it is another file. The message names the line.
        """
        where = ""
        try:
            lines = read_lines(path)
            _, settings = next(lines, (0, None))
            default_seed = (settings or {}).get("seed")
            for number, data in lines:
                where = f"line {number}: "
                line = read_strictly(
                    AttemptLine, {k: data[k] for k in LINE_FIELDS if k in data}, defaults=True
                )
                measured = {k: v for k, v in data.items() if k not in (*LINE_FIELDS, *WRITE_ONLY_FIELDS)}
                seed = (
                    line.seed
                    if line.seed is not None
                    else default_seed
                    if isinstance(default_seed, int)
                    else 0
                )
                attempt = read_strictly(AttemptMetrics, measured, defaults=True)
                self._keep(line.method, (seed, line.number), attempt, line.seconds)
        except AprError as error:
            reason = str(error).removeprefix(f"{path}, ")
            where = "" if reason.startswith(("line ", "cannot read")) else where
            raise AprError(f"{path} was not written by `sgl-apr eval ... -o`: {where}{reason}") from None
        return settings

    def _keep(self, method: str, key: CaseKey, measured: AttemptMetrics, seconds: float) -> None:
        self.attempts.setdefault(method, {})[key] = measured
        self.seconds[method] = max(seconds, self.seconds.get(method, 0.0))


@contextmanager
def open_evaluation(directory: Path | None, settings: Mapping[str, Any]) -> Iterator[ResultStore]:
    """Open the evaluation in a directory, with the attempts that it already has.

    Args:
        directory: Created if needed; None keeps attempts in memory only.
        settings: What all attempts have in common. `EXTENSIBLE_SETTINGS` may differ from those of earlier runs.

    Raises:
        AprError: If the directory holds an evaluation with other settings, or cannot be written.
    """
    if directory is None:
        yield ResultStore()
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise file_error("cannot write to", directory, error) from None
    path, expected = directory / RUN_FILE, json.loads(json.dumps(settings))
    with open_for_append(path) as file:
        store = ResultStore(file)
        stored = store.load(path)
        if stored is None:
            append_line(file, json.dumps(expected))
        elif differences := list(_differences(stored, expected)):
            raise AprError(
                f"{path} holds another evaluation: {'; '.join(differences)}. Give the same options or another -o"
            )
        yield store


def _differences(stored: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Each setting in which two runs differ, with both values."""
    for name in dict.fromkeys((*stored, *expected)):
        there, here = stored.get(name), expected.get(name)
        if there == here or (not prefix and name in EXTENSIBLE_SETTINGS):
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{prefix}{name} ")
        else:
            option = f"--{prefix}{name}" if prefix or name != "task" else "the task"
            yield f"{option} is {_shown(there)} there and {_shown(here)} here"


def _shown(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value)


def common_problems(attempted: Mapping[str, Collection[CaseKey]]) -> tuple[set[CaseKey], int]:
    """Return the problems that all methods attempted, and how many others at least one of them attempted.

    Examples:
        >>> common_problems({"apr": [(0, 0), (0, 1)], "sequential": [(0, 0)]})
        ({(0, 0)}, 1)

    Args:
        attempted: By method, the problems that it attempted.
    """
    keys = [set(problems) for problems in attempted.values()]
    common = set.intersection(*keys) if keys else set[CaseKey]()
    return common, len(set[CaseKey]().union(*keys)) - len(common)


def describe_left_out(count: int, methods: Collection[str]) -> str:
    """Say how many problems a comparison of these methods leaves out; empty if it leaves out none."""
    problems = "1 problem is" if count == 1 else f"{count} problems are"
    return (
        f"{problems} left out: not all of {', '.join(methods)} attempted {'it' if count == 1 else 'them'}"
        if count
        else ""
    )


def read_results(directory: Path) -> list[MethodResults]:
    """The methods of the evaluation in a directory, each with all its attempts.

    Raises:
        AprError: If the directory has no evaluation.
    """
    store = load_store(directory)
    return [store.results_of(method) for method in store.attempts]


def read_comparable_results(directory: Path) -> tuple[list[MethodResults], int]:
    """The methods of the evaluation in a directory, on the problems that all of them attempted.

    Returns:
        The methods, and how many problems are left out.

    Raises:
        AprError: If the directory has no evaluation, or its methods have no problem in common.
    """
    store = load_store(directory)
    common, left_out = common_problems(store.attempts)
    if store.attempts and not common:
        raise AprError(
            f"{directory / RUN_FILE}: {', '.join(store.attempts)} have no problem in common, expected attempts of all "
            "of them at the same problems"
        )
    return [store.results_of(method, sorted(common)) for method in store.attempts], left_out


def load_store(directory: Path) -> ResultStore:
    """Load the attempts of the evaluation in a directory.

    Raises:
        AprError: If the directory has no evaluation.
    """
    store = ResultStore()
    store.load(directory / RUN_FILE)
    return store
