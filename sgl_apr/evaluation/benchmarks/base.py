"""What an evaluation asks: problems that stay the same, who asks a model for them, and what is right; it asks nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.task import Task
from sgl_apr.runtime.budget import Budget


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
