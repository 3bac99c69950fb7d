"""Problems of one dataset of `reasoning-gym` and what it says to answers, a line of JSON for each; run as a program.

Some of its datasets read an answer with `eval`. Each is judged in a process of its own that can open nothing, start
nothing and reach nobody; all that it can do is to be wrong about itself.
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

warnings.simplefilter("ignore")  # of the library's own code

with redirect_stdout(sys.stderr):  # what is printed here is an answer
    from reasoning_gym.factory import DATASETS, create_dataset

ANSWER_TIMEOUT_S = 10  # for one answer
MEMORY_BYTES = 4 << 30


class Judge:
    """One dataset; its problems are made again for the same seed."""

    def __init__(self, name: str, seed: int, size: int) -> None:
        if name not in DATASETS:
            raise ValueError(
                f"no dataset {name!r} in reasoning-gym, expected one of {', '.join(sorted(DATASETS))}"
            )
        self.dataset = create_dataset(name, seed=seed, size=size)
        self.entries: list[Mapping[str, Any]] = [self.dataset[k] for k in range(size)]
        for entry in self.entries:  # what judging needs is imported meanwhile; later that is not possible
            with suppress(Exception):
                self.dataset.score_answer(entry["answer"], entry)
        if self.score_if_finished(0, "") is None:
            raise ValueError("answers cannot be judged here: nothing shuts in what they run")

    @property
    def problems(self) -> list[tuple[str, int]]:
        """Questions, and how hard each is."""
        return [(str(entry["question"]), problem_size(entry)) for entry in self.entries]

    def score(self, number: int, answer: str) -> float:
        """What the dataset says to an answer, from 0 to 1; 0 if it comes to no end."""
        return self.score_if_finished(number, answer) or 0.0

    def score_if_finished(self, number: int, answer: str) -> float | None:
        """The same; None if it comes to no end."""
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
            said = os.read(reading, 64) if select([reading], [], [], ANSWER_TIMEOUT_S)[0] else b""
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
        with suppress(ValueError):
            return min(1.0, max(0.0, float(said)))
        return None


def enter_sandbox() -> None:
    """Leave this process what it has: no other file, process, or peer."""
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
    """How hard a problem is: the first thing that its dataset varies and that it says of this one, else its words.

    >>> size({"question": "1 + 2?", "metadata": {"num_terms": 2, "difficulty": {"num_terms": (2, 6)}}})
    2
    """
    metadata = entry["metadata"]
    varied = metadata.get("difficulty")
    for name in varied if isinstance(varied, Mapping) else ():
        for found in (metadata.get(name), metadata.get(f"num_{name}")):
            if isinstance(found, (list, tuple, str)):
                return len(found)
            if isinstance(found, int):
                return found
    return len(str(entry["question"]).split())


def main() -> None:
    """Answer each line, in order: what is wanted of which dataset, seed and size; a number and an answer, for a score."""
    judge = cache(Judge)
    print("ready", flush=True)
    for line in sys.stdin:
        _, name, seed, size, *asked = json.loads(line)
        said: Any
        try:
            with redirect_stdout(sys.stderr):
                found = judge(name, seed, size)
                said = found.score(*asked) if asked else {"problems": found.problems}
        except Exception as error:  # of any kind: each dataset is code of its own
            said = {"error": f"{error}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
