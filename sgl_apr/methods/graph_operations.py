"""The operations of a graph of thoughts, and the check that a graph of them can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.methods.prompt import Completion, Prompt


class GraphError(AprError):
    """A graph of operations that cannot run."""


@dataclass(frozen=True)
class Operation:
    """An operation on all states that other operations have left.

    Attributes:
        depends_on: The names of those operations; without any, the operation gets the initial state.
    """

    depends_on: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Generate(Operation):
    """Replace each state by those that `k` replies about it lead to.

    Attributes:
        prompt: The prompt about a state; None keeps the state as it is.
        read: The states that a reply about a state leads to.
        k: Number of replies per state.
    """

    prompt: Callable[[Any], Prompt | None]
    read: Callable[[Any, str], Sequence[Any]]
    k: int = 1


@dataclass(frozen=True, kw_only=True)
class Aggregate(Operation):
    """Replace all states by those that `k` replies about all of them lead to.

    Attributes:
        prompt: The prompt about all states.
        read: The states that a reply leads to.
        k: Number of replies.
    """

    prompt: Callable[[Sequence[Any]], Prompt]
    read: Callable[[Sequence[Any], str], Sequence[Any]]
    k: int = 1


@dataclass(frozen=True, kw_only=True)
class Refine(Operation):
    """Replace each state by the first one that a reply about it leads to; without one, the state stays.

    Attributes:
        prompt: The prompt about a state; None keeps the state as it is.
        read: The states that a reply about a state leads to.
    """

    prompt: Callable[[Any], Prompt | None]
    read: Callable[[Any, str], Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Score(Operation):
    """Give each state a score.

    Attributes:
        score: The score of a state, higher is better; or the prompt that asks the model for it.
        read: The score in a completion about a state; needed where `score` returns prompts.
        k: Number of replies, of whose scores the mean counts.
    """

    score: Callable[[Any], Prompt | float]
    read: Callable[[Any, Completion], float] | None = None
    k: int = 1


@dataclass(frozen=True, kw_only=True)
class KeepBest(Operation):
    """Keep the `n` states with the highest scores."""

    n: int = 1


Graph = Mapping[str, Operation]


def validate_graph(graph: Graph) -> Graph:
    """Check that a graph can run.

    Returns:
        The same graph.

    Raises:
        GraphError: If it has a cycle or not exactly one last operation, depends on an unknown operation, keeps the
            best of states without scores, or runs an operation less than once.

    Examples:
        >>> validate_graph({"think": Generate(prompt=Prompt, read=lambda s, text: [text]), "keep": KeepBest(depends_on=("think",))})
        Traceback (most recent call last):
        sgl_apr.methods.graph_operations.GraphError: 'keep' keeps the best of 'think', which gives no scores
    """
    for name, operation in graph.items():
        for dependency in operation.depends_on:
            if dependency not in graph:
                raise GraphError(f"{name!r} depends on {dependency!r}, expected one of {', '.join(graph)}")
            if isinstance(operation, KeepBest) and not isinstance(graph[dependency], Score | KeepBest):
                raise GraphError(f"{name!r} keeps the best of {dependency!r}, which gives no scores")
        if isinstance(operation, KeepBest) and not operation.depends_on:
            raise GraphError(f"{name!r} keeps the best of nothing, expected operations in depends_on")
        repeats = getattr(operation, "n" if isinstance(operation, KeepBest) else "k", 1)
        if repeats < 1:
            raise GraphError(f"{name!r} runs {repeats} times, expected 1 or more")
    try:
        TopologicalSorter({name: operation.depends_on for name, operation in graph.items()}).prepare()
    except CycleError as error:
        raise GraphError(f"found a cycle of operations: {' -> '.join(error.args[1])}") from None
    last = set(graph) - {dependency for operation in graph.values() for dependency in operation.depends_on}
    if len(last) != 1:
        raise GraphError(f"found {len(last)} last operations, expected one: {', '.join(sorted(last))}")
    return graph
