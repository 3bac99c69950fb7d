"""Graph of thoughts: operations on thoughts, each run as soon as all that it depends on are done."""

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
from sgl_apr.methods.session import MethodSession, method_session
from sgl_apr.methods.task import GraphTask, Task, require_family
from sgl_apr.runtime.branch_group import gather


@dataclass(frozen=True)
class GraphNode:
    """A state of a graph of thoughts.

    Attributes:
        state: The state, of the task's own type.
        depends_on: The completions that led to the state or to its score.
        score: The score of the state, None as long as it has none.
    """

    state: Any
    depends_on: tuple[Completion, ...] = ()
    score: float | None = None


async def graph_of_thoughts(
    engine: Engine, problem: Any, *, task: Task[Any], temperature: float = 1.0, **options: Any
) -> MethodResult:
    """Graph of Thoughts (Besta 2023, arXiv 2308.09687, section 3): generate, aggregate, refine, score, keep the best.

    The task defines the graph (`GraphTask.graph`). Each prompt about a state has a context of its own, and sees what
    it shows of the parents of the state. Operations that do not depend on each other run in parallel, where the
    published controller runs one after another. Each gets an equal share of what the operations before it have left
    of the budget. The answer is the best state of the last operation that the task finds to be a solution.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `GraphTask`.
        temperature: Sampling temperature (1.0 in the paper, section 7.1).
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `GraphTask`.
        GraphError: If its graph cannot run.
    """
    graphed = require_family(task, GraphTask)
    graph, options = validate_graph(graphed.graph(problem)), {**options, "temperature": temperature}
    async with method_session(engine, "", "graph_of_thoughts", **options) as session:
        nodes = await _Run(session, graphed, graph).run(GraphNode(graphed.initial_state(problem)))
        solved = [(node, answer) for node in nodes if (answer := graphed.solution(node.state)) is not None]
        best, answer = max(solved, key=lambda pair: pair[0].score or 0.0, default=(None, ""))
        return MethodResult("graph_of_thoughts", answer, session.finish(), best.score if best else None)


@dataclass
class _Run:
    session: MethodSession
    task: GraphTask[Any, Any]
    graph: Graph
    left: int = field(init=False)  # operations that need the model and are not done yet

    def __post_init__(self) -> None:
        self.left = sum(map(_needs_model, self.graph.values()))

    async def run(self, root: GraphNode) -> list[GraphNode]:
        """The nodes that the last operation leaves."""
        loop = asyncio.get_running_loop()
        results = {name: loop.create_future() for name in self.graph}

        async def run(name: str, operation: Operation) -> list[GraphNode]:
            inputs = [node for dependency in operation.depends_on for node in await results[dependency]]
            nodes = await self.apply(operation, inputs if operation.depends_on else [root])
            self.left -= _needs_model(operation)
            results[name].set_result(nodes)
            return nodes

        results_in_order = await gather(run(name, operation) for name, operation in self.graph.items())
        needed = {name for operation in self.graph.values() for name in operation.depends_on}
        return next(
            nodes for name, nodes in zip(self.graph, results_in_order, strict=True) if name not in needed
        )

    async def apply(self, operation: Operation, nodes: Sequence[GraphNode]) -> list[GraphNode]:
        """The nodes that an operation makes of its inputs."""
        match operation:
            case Generate(prompt=prompt_for, read=read, k=k):
                generated = list[GraphNode]()
                for node, replies in await self.sample([(node, prompt_for(node.state)) for node in nodes], k):
                    generated += [node] if replies is None else _children(node, replies, read)
                return generated
            case Aggregate(prompt=prompt_for_all, read=read_all, k=k) if nodes:
                union = GraphNode(
                    [node.state for node in nodes], tuple(t for node in nodes for t in node.depends_on)
                )
                ((_, replies),) = await self.sample([(union, prompt_for_all(union.state))], k)
                return _children(union, replies or (), read_all)
            case Refine(prompt=prompt_for, read=read):
                refined = list[GraphNode]()
                for node, replies in await self.sample([(node, prompt_for(node.state)) for node in nodes], 1):
                    refined += _children(node, replies or (), read)[:1] or [node]
                return refined
            case Score():
                return await self.score(operation, nodes)
            case KeepBest(n=n):
                return sorted(nodes, key=lambda node: -(node.score or 0.0))[:n]
        return []

    async def score(self, operation: Score, nodes: Sequence[GraphNode]) -> list[GraphNode]:
        """The nodes with their scores, without those whose score was requested and did not come."""
        scores = [operation.score(node.state) for node in nodes]
        prompts = [score if isinstance(score, Prompt) else None for score in scores]
        samples = await self.sample(list(zip(nodes, prompts, strict=True)), operation.k)
        scored = list[GraphNode]()
        for score, (node, replies) in zip(scores, samples, strict=True):
            if not isinstance(score, Prompt):
                scored.append(replace(node, score=score))
            elif replies and operation.read:
                mean = fmean(operation.read(node.state, reply) for reply in replies)
                scored.append(replace(node, depends_on=tuple(replies), score=mean))
        return scored

    async def sample(
        self, prompts: Sequence[tuple[GraphNode, Prompt | None]], k: int
    ) -> list[tuple[GraphNode, list[Completion] | None]]:
        """Each node with up to `k` replies to its prompt, within the budget; None for a node without a prompt."""
        requests = [replace(prompt, depends_on=node.depends_on) for node, prompt in prompts if prompt]
        replies = iter(list[list[Completion]]())
        if requests:
            share, tokens = (
                1 / self.left,
                max(request.tokens or self.task.step_tokens for request in requests),
            )
            width = self.session.affordable_width(len(requests) * k, tokens, share)
            each = max(1, width // len(requests))
            replies = iter(await self.session.samples(requests[:width], each, share=share))
        return [
            (node, [t for t in next(replies, ()) if t.finish != "failed"] if prompt else None)
            for node, prompt in prompts
        ]


def _needs_model(operation: Operation) -> bool:
    return not isinstance(operation, KeepBest | Score) or (
        isinstance(operation, Score) and bool(operation.read)
    )


def _children(
    node: GraphNode, replies: Iterable[Completion], read: Callable[[Any, str], Sequence[Any]]
) -> list[GraphNode]:
    """The nodes that replies about a node lead to."""
    return [GraphNode(state, (reply,)) for reply in replies for state in read(node.state, reply.text)]
