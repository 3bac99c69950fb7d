"""A graph of operations that a task has drawn: each is done as soon as all that it comes after have been."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.methods.graph_operations import (
    Aggregate,
    Generate,
    Graph,
    KeepBest,
    Operation,
    Refine,
    Score,
    validate_graph,
)
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import MethodSession, gather, method_session
from sgl_apr.methods.task import Task


@dataclass(frozen=True)
class Node:
    """A state, what had been thought by then, and its score."""

    state: Any
    depends_on: tuple[Completion, ...] = ()
    score: float | None = None


async def graph_of_thoughts(
    engine: Engine, problem: Any, *, task: Task[Any, Any], temperature: float = 1.0, **options: Any
) -> MethodResult:
    """Graph of Thoughts (Besta 2023, arXiv 2308.09687, section 3): generate, aggregate, refine, score, keep the best.

    The task draws the graph (`Task.graph`; raises `GraphError` for one that cannot be run). A state is asked about in
    a context of its own, and sees what its ask shows of its parents. Operations that wait for nothing run at once,
    where the published controller runs one after another; each has an equal share of what those before it have left.
    The answer is the best of the last operation that the task finds solved. T = 1 is the paper's (section 7.1).
    """
    graph, options = validate_graph(task.graph(problem)), {**options, "temperature": temperature}
    async with method_session(engine, "", "graph_of_thoughts", **options) as thoughts:
        nodes = await _Run(thoughts, task, graph).all(Node(task.begin(problem)))
        solved = [(node, answer) for node in nodes if (answer := task.solved(node.state)) is not None]
        best, answer = max(solved, key=lambda found: found[0].score or 0.0, default=(None, ""))
        return MethodResult("graph_of_thoughts", answer, thoughts.finish(), best.score if best else None)


@dataclass
class _Run:
    thoughts: MethodSession
    task: Task[Any, Any]
    graph: Graph
    left: int = field(init=False)  # operations that ask something, and are not done yet

    def __post_init__(self) -> None:
        self.left = sum(map(_asks, self.graph.values()))

    async def all(self, begin: Node) -> list[Node]:
        """What the last operation leaves."""
        loop = asyncio.get_running_loop()
        left = {name: loop.create_future() for name in self.graph}

        async def run(name: str, operation: Operation) -> list[Node]:
            before = [node for other in operation.depends_on for node in await left[other]]
            found = await self.done(operation, before if operation.depends_on else [begin])
            self.left -= _asks(operation)
            left[name].set_result(found)
            return found

        found = await gather(run(name, operation) for name, operation in self.graph.items())
        followed = {name for operation in self.graph.values() for name in operation.depends_on}
        return next(nodes for name, nodes in zip(self.graph, found, strict=True) if name not in followed)

    async def done(self, operation: Operation, nodes: Sequence[Node]) -> list[Node]:
        """What an operation makes of them."""
        match operation:
            case Generate(ask=ask, read=read, k=k):
                found = list[Node]()
                for node, said in await self.asked([(node, ask(node.state)) for node in nodes], k):
                    found += [node] if said is None else _led(node, said, read)
                return found
            case Aggregate(ask=every, read=read_all, k=k) if nodes:
                whole = Node(
                    [node.state for node in nodes], tuple(t for node in nodes for t in node.depends_on)
                )
                ((_, said),) = await self.asked([(whole, every(whole.state))], k)
                return _led(whole, said or (), read_all)
            case Refine(ask=ask, read=read):
                refined = list[Node]()
                for node, said in await self.asked([(node, ask(node.state)) for node in nodes], 1):
                    refined += _led(node, said or (), read)[:1] or [node]
                return refined
            case Score():
                return await self.scored(operation, nodes)
            case KeepBest(n=n):
                return sorted(nodes, key=lambda node: -(node.score or 0.0))[:n]
        return []

    async def scored(self, operation: Score, nodes: Sequence[Node]) -> list[Node]:
        """With their scores; without those whose score was asked for and did not come."""
        worth = [operation.score(node.state) for node in nodes]
        asks = [found if isinstance(found, Prompt) else None for found in worth]
        said = await self.asked(list(zip(nodes, asks, strict=True)), operation.k)
        found = list[Node]()
        for known, (node, thoughts) in zip(worth, said, strict=True):
            if not isinstance(known, Prompt):
                found.append(replace(node, score=known))
            elif thoughts and operation.read:
                score = fmean(operation.read(node.state, thought) for thought in thoughts)
                found.append(replace(node, depends_on=tuple(thoughts), score=score))
        return found

    async def asked(
        self, wanted: Sequence[tuple[Node, Prompt | None]], k: int
    ) -> list[tuple[Node, list[Completion] | None]]:
        """Each with up to `k` replies, as far as the budget bears them; None where nothing was asked."""
        asks = [replace(ask, depends_on=node.depends_on) for node, ask in wanted if ask]
        replies = iter(list[list[Completion]]())
        if asks:
            of, need = 1 / self.left, max(ask.tokens or self.task.step for ask in asks)
            width = self.thoughts.affordable_width(len(asks) * k, need, of)
            each = max(1, width // len(asks))
            replies = iter(await self.thoughts.samples(asks[:width], each, of=of))
        return [
            (node, [t for t in next(replies, ()) if t.finish != "failed"] if ask else None)
            for node, ask in wanted
        ]


def _asks(operation: Operation) -> bool:
    """Whether it asks the model something."""
    return not isinstance(operation, KeepBest | Score) or (
        isinstance(operation, Score) and bool(operation.read)
    )


def _led(node: Node, said: Iterable[Completion], read: Callable[[Any, str], Sequence[Any]]) -> list[Node]:
    """What replies about a state have led to."""
    return [Node(state, (thought,)) for thought in said for state in read(node.state, thought.text)]
