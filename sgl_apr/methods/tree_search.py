"""Steps that a model proposes and judges, asked about many states at once; which of them go on is a search's to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.session import MethodSession
from sgl_apr.methods.task import Task


@dataclass(frozen=True)
class Node:
    """A state, what had been thought by then, and what it is worth."""

    state: Any
    depends_on: tuple[Completion, ...] = ()
    value: float = 0.0


@dataclass(frozen=True)
class SearchModel:
    """Those of one task in one run."""

    thoughts: MethodSession
    task: Task[Any, Any]

    async def proposed(self, nodes: Sequence[Node], each: int) -> list[list[Completion]]:
        """`each` samples of what comes next behind every one of them."""
        asks = [replace(self.task.propose(node.state), depends_on=node.depends_on) for node in nodes]
        return await self.thoughts.samples(asks, each)

    def children(self, node: Node, said: Sequence[Completion]) -> list[Node]:
        """What those behind one lead to, each state once."""
        found: dict[Any, Node] = {}
        for thought in said:
            for state in self.task.expand(node.state, thought.text):
                found.setdefault(state, Node(state, (thought,)))
        return list(found.values())

    async def evaluate(self, nodes: Sequence[Node], each: int) -> list[Node]:
        """With the mean of `each` values that the model gives; what was cut gives 0."""
        wanted = [(node, self.task.evaluate(node.state)) for node in nodes]
        asks = [replace(ask, depends_on=node.depends_on) for node, ask in wanted if isinstance(ask, Prompt)]
        said = iter(await self.thoughts.samples(asks, each))
        return [
            self._mean(node, next(said)) if isinstance(ask, Prompt) else replace(node, value=ask)
            for node, ask in wanted
        ]

    def _mean(self, node: Node, said: Sequence[Completion]) -> Node:
        value = fmean(self.task.value(node.state, thought) if thought.text else 0.0 for thought in said)
        return replace(node, depends_on=tuple(said), value=value)
