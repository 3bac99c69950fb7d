"""What an evaluation asks: problems that stay the same, who asks a model for them, and what is right; it asks nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.evaluation.tasks.countdown.problems import Split
from sgl_apr.methods.task import Task
from sgl_apr.runtime.budget import Budget

NAMES = ("countdown", "game24", "gym:NAME", "FILE.jsonl")


@dataclass(frozen=True, slots=True)
class Case:
    """One problem. name: no other has it, in every run. problem: as its task takes it. size: the harder, the larger."""

    name: str
    problem: Any
    size: int = 0


@dataclass(frozen=True)
class Benchmark:
    """task: what asks a model behind an engine. right: whether an answer to a case is. budget: of a reply, unless asked
    otherwise. flags: of a server that is started for it."""

    name: str
    cases: Sequence[Case]
    task: Callable[[Engine], Task[Any, Any]]
    is_correct: Callable[[Case, str], bool]
    budget: Budget = field(default_factory=Budget)
    flags: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.cases:
            raise AprError(f"{self.name} has no problem, expected at least one")
        if len({case.name for case in self.cases}) < len(self.cases):
            raise AprError(f"{self.name} has two problems of one name, expected different ones")

    @property
    def directory(self) -> str:
        """Its name as that of a directory.

        >>> Benchmark("gym:ab", [Case("1", "?")], Task, lambda case, answer: False).directory
        'gym-ab'
        """
        return re.sub(r"[^\w.-]+", "-", self.name)


def benchmark(name: str, limit: int, split: Split = "test", seed: int = 0) -> Benchmark:
    """The one of that name, with so many problems at the most; raises `AprError` for one that there is not.

    `split` and `seed` are of those that are made here; problems of a file are taken in its order.
    """
    from sgl_apr.evaluation.benchmarks import games, gym, problem_file

    kind, _, rest = name.partition(":")
    if limit < 1:
        raise AprError(f"limit={limit}, expected at least 1")
    if name in ("countdown", "game24"):
        made: Benchmark = getattr(games, name)(limit, split, seed)
        return made
    if kind == "gym" and rest:
        return gym.gym(rest, limit, split, seed)
    if name.endswith(".jsonl"):
        return problem_file.problem_file(name, limit)
    raise AprError(f"no task {name!r}, expected one of {', '.join(NAMES)}")
