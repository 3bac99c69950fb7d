"""What a method came to, the same for all of them; and their register. Nothing is run here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.trajectory.metrics import Metrics
from sgl_apr.trajectory.trajectory import Trajectory

_OWN = (
    "sequential", "self_consistency", "best_of_n", "skeleton_of_thought", "tree_of_thoughts", "graph_of_thoughts",
    "mcts", "group_think", "hogwild", "recursive",
)  # fmt: skip
_ADAPTIVE = ("parathinker", "threadweaver", "multiverse", "npr", "parallel_r1", "apr")
METHOD_MODULES = {name: name for name in _OWN} | dict.fromkeys(_ADAPTIVE, "native_formats")
METHOD_NAMES = tuple(METHOD_MODULES)


@dataclass(frozen=True)
class MethodResult:
    """The answer of a method, and how it came about.

    answer: as its task reads it, empty if there is none. score: what the method chose it by (votes, a value, a
    verifier's word), None where it chose nothing. label: what was run, honestly: "exact", or what it stands for.
    """

    method: str
    answer: str
    trajectory: Trajectory
    score: float | None = None
    label: str = "exact"

    @property
    def metrics(self) -> Metrics:
        """Tokens, critical path, what the engine did."""
        return self.trajectory.metrics()


Method = Callable[..., Awaitable[MethodResult]]


def method(name: str) -> Method:
    """The method of that name; raises `AprError` that lists them."""
    if name not in METHOD_MODULES:
        raise AprError(f"no method {name!r}, expected one of {', '.join(METHOD_MODULES)}")
    found: Mapping[str, Any] = vars(import_module(f"sgl_apr.methods.{METHOD_MODULES[name]}"))
    run: Method = found[name]
    return run
