"""The methods by name, and the result that all of them return."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.trajectory.metrics import Metrics
from sgl_apr.trajectory.trajectory import Trajectory

_FIXED = (
    "sequential", "self_consistency", "best_of_n", "skeleton_of_thought", "tree_of_thoughts", "graph_of_thoughts",
    "mcts", "group_think", "hogwild", "recursive",
)  # fmt: skip
_ADAPTIVE = ("parathinker", "threadweaver", "multiverse", "npr", "parallel_r1", "apr")
METHOD_MODULES = {name: name for name in _FIXED} | dict.fromkeys(_ADAPTIVE, "native_formats")
METHOD_NAMES = tuple(METHOD_MODULES)


@dataclass(frozen=True)
class MethodResult:
    """The answer of a method, and how it was found.

    Attributes:
        method: The name of the method.
        answer: The answer as the task reads it, empty if there is none.
        trajectory: Everything that was decoded.
        score: What the method chose the answer by (share of votes, value, verifier's score); None if it did not choose.
        label: What exactly was run: "exact", or how it differs from the published method.
    """

    method: str
    answer: str
    trajectory: Trajectory
    score: float | None = None
    label: str = "exact"

    @property
    def metrics(self) -> Metrics:
        """Tokens, critical path, and the work of the engine."""
        return self.trajectory.metrics()


Method = Callable[..., Awaitable[MethodResult]]


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        AprError: If there is none; the message lists all names.
    """
    if name not in METHOD_MODULES:
        raise AprError(f"no method {name!r}, expected one of {', '.join(METHOD_MODULES)}")
    module: Mapping[str, Any] = vars(import_module(f"sgl_apr.methods.{METHOD_MODULES[name]}"))
    run: Method = module[name]
    return run
