"""Generate problems of a `reasoning-gym` dataset and score answers, one line of JSON each; run as a program.

Some datasets read an answer with `eval`. Each answer is therefore scored in a forked process that can open no file, start
no process and reach no network: the worst that it can do is to misreport its own score.
"""

from __future__ import annotations

import io
import json
import os
import platform
import resource
import signal
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from functools import cache
from select import select
from typing import Any

from sgl_apr.methods.sandbox import seccomp

warnings.simplefilter("ignore")  # the library's own

with redirect_stdout(sys.stderr):  # stdout carries the answers of this program
    from reasoning_gym.factory import DATASETS, create_dataset

ANSWER_TIMEOUT_S = 10
MEMORY_BYTES = 4 << 30


class Judge:
    """One dataset, generated from a seed.

    Raises:
        ValueError: If there is no such dataset, or answers cannot be isolated on this machine.
    """

    def __init__(self, name: str, seed: int, size: int) -> None:
        if name not in DATASETS:
            raise ValueError(
                f"no dataset {name!r} in reasoning-gym, expected one of {', '.join(sorted(DATASETS))}"
            )
        self.dataset = create_dataset(name, seed=seed, size=size)
        self.entries: list[Mapping[str, Any]] = [self.dataset[k] for k in range(size)]
        for entry in self.entries:  # imports what scoring needs, which the sandbox would forbid later
            with suppress(Exception):
                self.dataset.score_answer(entry["answer"], entry)
        if self.score_if_finished(0, "") is None:
            raise ValueError("answers cannot be judged here: this machine cannot isolate what they run")

    @property
    def problems(self) -> list[tuple[str, int]]:
        """(question, size) of each problem."""
        return [(str(entry["question"]), problem_size(entry)) for entry in self.entries]

    def score(self, number: int, answer: str) -> float:
        """The dataset's score of an answer, from 0 to 1; 0 if scoring does not finish."""
        return self.score_if_finished(number, answer) or 0.0

    def score_if_finished(self, number: int, answer: str) -> float | None:
        """The same; None if scoring does not finish."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                enter_sandbox()
                entry = self.entries[number]
                os.write(writing, json.dumps(float(self.dataset.score_answer(answer, entry))).encode())
            finally:
                os._exit(0)
        os.close(writing)
        try:
            output = os.read(reading, 64) if select([reading], [], [], ANSWER_TIMEOUT_S)[0] else b""
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
        with suppress(ValueError):
            return min(1.0, max(0.0, float(output)))
        return None


def enter_sandbox() -> None:
    """Take away from this process all files, the network, and the right to start processes."""
    for file in (0, 1, 2):
        os.close(file)
    sys.stdout = sys.stderr = io.StringIO()
    for limit, value in (
        (resource.RLIMIT_NOFILE, 0), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, ANSWER_TIMEOUT_S), (resource.RLIMIT_AS, MEMORY_BYTES),
    ):  # fmt: skip
        resource.setrlimit(limit, (value, value))
    seccomp.install(platform.machine())


def problem_size(entry: Mapping[str, Any]) -> int:
    """How hard a problem is.

    That is the first parameter that its dataset varies and its metadata records; otherwise the words of the question.

    Examples:
        >>> problem_size({"question": "1 + 2?", "metadata": {"num_terms": 2, "difficulty": {"num_terms": (2, 6)}}})
        2
    """
    metadata = entry["metadata"]
    varied = metadata.get("difficulty")
    for name in varied if isinstance(varied, Mapping) else ():
        for value in (metadata.get(name), metadata.get(f"num_{name}")):
            if isinstance(value, (list, tuple, str)):
                return len(value)
            if isinstance(value, int):
                return value
    return len(str(entry["question"]).split())


def main() -> None:
    """Answer each line in order: `[function, dataset, seed, size]`, or with a problem number and an answer, to score it."""
    judge = cache(Judge)
    print("ready", flush=True)
    for line in sys.stdin:
        _, name, seed, size, *arguments = json.loads(line)
        response: Any
        try:
            with redirect_stdout(sys.stderr):
                dataset = judge(name, seed, size)
                response = dataset.score(*arguments) if arguments else {"problems": dataset.problems}
        except Exception as error:  # any kind: each dataset is third-party code
            response = {"error": f"{error}"}
        print(json.dumps(response), flush=True)


if __name__ == "__main__":
    main()
