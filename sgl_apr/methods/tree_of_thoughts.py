"""A search among steps that a model proposes and judges: breadth first or depth first, by value or by vote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import MethodSession, method_session
from sgl_apr.methods.task import Task
from sgl_apr.methods.tree_search import Node, SearchModel

Search = Literal["bfs", "dfs"]
Select = Literal["value", "vote"]


async def tree_of_thoughts(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any, Any],
    search: Search = "bfs",
    select: Select = "value",
    breadth: int = 5,
    proposals: int = 3,
    evaluations: int = 3,
    threshold: float = 0.0,
    temperature: float = 0.7,
    **options: Any,
) -> MethodResult:
    """Tree of Thoughts (Yao 2023, arXiv 2305.10601, section 3, algorithms 1 and 2).

    breadth: states kept at each level (b = 5 for the Game of 24, section 4.1). proposals: samples of the next step
    from each; a sample may name several. evaluations: samples of the value of each state (3 there, at T = 0.7), whose
    mean is its value; with "vote" as many votes over all states of a level. threshold: depth first goes no further
    into a state of this value or less. The states of a level are thought about at once, where the paper's code asks
    for one after another; depth first the proposals of a state are, and their values.
    """
    if search not in get_args(Search) or select not in get_args(Select):
        raise AprError(f"search={search!r}, select={select!r}, expected bfs or dfs, value or vote")
    if search == "dfs" and select == "vote":
        raise AprError('select="vote" compares the states of a level, expected search="bfs"')
    begin = Node(task.begin(problem))
    options = {**options, "temperature": temperature}
    async with method_session(engine, "", "tree_of_thoughts", **options) as thoughts:
        tree = _Tree(thoughts, task, problem, select, breadth, proposals, evaluations)
        best = await (tree.bfs(begin) if search == "bfs" else tree.dfs(begin, threshold))
        answer = task.solved(best.state) if best else None
        return MethodResult("tree_of_thoughts", answer or "", thoughts.finish(), best.value if best else None)


@dataclass
class _Tree:
    thoughts: MethodSession
    task: Task[Any, Any]
    problem: Any
    select: Select
    breadth: int
    proposals: int
    evaluations: int

    @property
    def steps(self) -> SearchModel:
        return SearchModel(self.thoughts, self.task)

    async def bfs(self, begin: Node) -> Node | None:
        """Algorithm 1: all proposals of a level, of which the best go on. It ends early where one is a solution."""
        level = [begin]
        for _ in range(self.task.thoughts):
            candidates = await self.grown(level)
            if self.select == "vote":
                valued = await self.voted(candidates)
            else:
                valued = await self.steps.evaluate(candidates, self.evaluations)
            level = sorted(valued, key=lambda node: -node.value)[: self.breadth]
            if not level or self.task.solved(level[0].state) is not None:
                break
        return next((node for node in level if self.task.solved(node.state) is not None), None)

    async def dfs(self, node: Node, threshold: float, depth: int = 0) -> Node | None:
        """Algorithm 2: the best proposal first, back where none is worth more than the threshold."""
        if self.task.solved(node.state) is not None:
            return node
        if depth == self.task.thoughts:
            return None
        children = await self.steps.evaluate(await self.grown([node]), self.evaluations)
        for child in sorted(children, key=lambda child: -child.value):
            if child.value > threshold and (found := await self.dfs(child, threshold, depth + 1)):
                return found
        return None

    async def grown(self, level: Sequence[Node]) -> list[Node]:
        """What the steps proposed from each of them lead to, each state once."""
        width = self.thoughts.affordable_width(len(level) * self.proposals, self.task.step)
        level = level[:width]
        said = await self.steps.proposed(level, width // len(level))
        found: dict[Any, Node] = {}
        for node, thoughts in zip(level, said, strict=True):
            for child in self.steps.children(node, thoughts):
                found.setdefault(child.state, child)
        return list(found.values())

    async def voted(self, nodes: Sequence[Node]) -> list[Node]:
        """With their shares of the votes of the model, which sees all of them."""
        if not nodes:
            return []
        ask = self.task.vote(self.problem, [self.task.show(node.state) for node in nodes])
        after = tuple(t for node in nodes for t in node.depends_on)
        (said,) = await self.thoughts.samples([replace(ask, depends_on=after)], self.evaluations)
        votes = Counter(self.task.choice(thought.text, len(nodes)) for thought in said)
        return [
            replace(node, depends_on=tuple(said), value=votes[k] / len(said)) for k, node in enumerate(nodes)
        ]
