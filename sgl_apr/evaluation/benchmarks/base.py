"""What an evaluation needs: fixed problems, the task that puts them to a model, and what counts as correct."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.task import Task
from sgl_apr.runtime.budget import Budget

CaseKey = tuple[int, int]  # the seed of a problem, and its number among the problems of that seed


@dataclass(frozen=True, slots=True)
class Case:
    """One problem.

    Attributes:
        name: Unique within its benchmark, and the same in every run.
        problem: As its task takes it.
        size: The harder the problem, the larger.
        key: Its seed, and its number among the problems of that seed: the same in every run, whatever its limit and its
            other seeds. None for seed 0 and its place in the benchmark.
    """

    name: str
    problem: Any
    size: int = 0
    key: CaseKey | None = None


@dataclass(frozen=True)
class Benchmark:
    """A named set of problems.

    Attributes:
        name: Its name, as `benchmark` takes it.
        cases: The problems.
        task: Makes the task for an engine.
        is_correct: Whether an answer to a case is correct.
        budget: The default budget of a reply.
        flags: Options of a server that is launched for it.

    Raises:
        AprError: Without a problem, or with two problems of the same name.
    """

    name: str
    cases: Sequence[Case]
    task: Callable[[Engine], Task[Any]]
    is_correct: Callable[[Case, str], bool]
    budget: Budget = field(default_factory=Budget)
    flags: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.cases:
            raise AprError(f"{self.name} has no problem, expected at least one")
        if len({case.name for case in self.cases}) < len(self.cases):
            raise AprError(f"{self.name} has two problems of the same name, expected different names")

    @property
    def keyed_cases(self) -> dict[CaseKey, Case]:
        """The problems by their keys, in order."""
        return {case.key or (0, number): case for number, case in enumerate(self.cases)}

    @property
    def directory(self) -> str:
        """Its name, made fit for a directory.

        Examples:
            >>> Benchmark("gym:ab", [Case("1", "?")], Task, lambda case, answer: False).directory
            'gym-ab'
        """
        return re.sub(r"[^\w.-]+", "-", self.name)
