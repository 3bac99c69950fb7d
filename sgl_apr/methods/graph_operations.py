"""Operations on thoughts, and which comes behind which: what a task says of a graph; it is run elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.methods.prompt import Completion, Prompt


class GraphError(AprError):
    """A graph of operations that cannot be run."""


@dataclass(frozen=True)
class Operation:
    """What is done with all states that the operations it comes `after` have left; without any, with the first."""

    depends_on: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Generate(Operation):
    """`k` replies about each state, and the states that each leads to. What nothing is asked about stays as it is."""

    ask: Callable[[Any], Prompt | None]
    read: Callable[[Any, str], Sequence[Any]]
    k: int = 1


@dataclass(frozen=True, kw_only=True)
class Aggregate(Operation):
    """`k` replies about all of the states together."""

    ask: Callable[[Sequence[Any]], Prompt]
    read: Callable[[Sequence[Any], str], Sequence[Any]]
    k: int = 1


@dataclass(frozen=True, kw_only=True)
class Refine(Operation):
    """The first state that a reply about each leads to in its place, if there is something to ask and one to read."""

    ask: Callable[[Any], Prompt | None]
    read: Callable[[Any, str], Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Score(Operation):
    """What each state is worth, the more the better. With `read` the model is asked: the mean of `k` replies."""

    score: Callable[[Any], Prompt | float]
    read: Callable[[Any, Completion], float] | None = None
    k: int = 1


@dataclass(frozen=True, kw_only=True)
class KeepBest(Operation):
    """The `n` states with the highest scores."""

    n: int = 1


Graph = Mapping[str, Operation]


def validate_graph(graph: Graph) -> Graph:
    """The same; raises `GraphError` if it cannot be run: it has a cycle or no end, comes behind what is not there,
    keeps the best of what has no score, or does something less than once.

    >>> checked({"think": Generate(ask=Ask, read=lambda state, text: [text]), "keep": KeepBest(depends_on=("think",))})
    Traceback (most recent call last):
    sgl_apr.methods.graph_operations.GraphError: 'keep' keeps the best of 'think', which says no score
    """
    for name, operation in graph.items():
        for before in operation.depends_on:
            if before not in graph:
                raise GraphError(f"{name!r} comes after {before!r}, expected one of {', '.join(graph)}")
            if isinstance(operation, KeepBest) and not isinstance(graph[before], Score | KeepBest):
                raise GraphError(f"{name!r} keeps the best of {before!r}, which says no score")
        if isinstance(operation, KeepBest) and not operation.depends_on:
            raise GraphError(f"{name!r} keeps the best of nothing")
        times = getattr(operation, "n" if isinstance(operation, KeepBest) else "k", 1)
        if times < 1:
            raise GraphError(f"{name!r} is to be done {times} times, expected 1 or more")
    try:
        TopologicalSorter({name: operation.depends_on for name, operation in graph.items()}).prepare()
    except CycleError as error:
        raise GraphError(f"a graph of operations has no cycle: {' -> '.join(error.args[1])}") from None
    ends = set(graph) - {before for operation in graph.values() for before in operation.depends_on}
    if len(ends) != 1:
        raise GraphError(f"a graph of operations ends with one, not {len(ends)}: {', '.join(sorted(ends))}")
    return graph
