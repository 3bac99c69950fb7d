"""Tree of thoughts: a search over steps that a model proposes and judges, breadth first or depth first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import MethodSession, method_session
from sgl_apr.methods.task import SearchTask, Task, ValuedSearchTask, VotedSearchTask, require_family
from sgl_apr.methods.tree_search import SearchModel, SearchNode

Search = Literal["bfs", "dfs"]
Select = Literal["value", "vote"]


async def tree_of_thoughts(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
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

    The states of a level are expanded and valued in parallel, where the paper's code sends one request after another.
    Depth first, the proposals of a state run in parallel, and their values.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `ValuedSearchTask`, or a `VotedSearchTask` with `select="vote"`.
        search: "bfs" (algorithm 1) or "dfs" (algorithm 2).
        select: "value" ranks states by the mean of their values, "vote" by votes over all states of a level.
        breadth: States that are kept at each level (b = 5 for the Game of 24, section 4.1).
        proposals: Samples of the next step from each state; one sample may name several steps.
        evaluations: Samples of the value of each state (3 in section 4.1), or votes on each level.
        threshold: Depth first, states of this value or less are not searched further.
        temperature: Sampling temperature (0.7 in section 4.1).
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is not of the required kind.
    """
    if search not in get_args(Search) or select not in get_args(Select):
        raise AprError(f"search={search!r}, select={select!r}, expected bfs or dfs, value or vote")
    if search == "dfs" and select == "vote":
        raise AprError('select="vote" compares the states of a level, expected search="bfs"')
    for name, value in (("breadth", breadth), ("proposals", proposals), ("evaluations", evaluations)):
        if value < 1:
            raise AprError(f"{name}={value}, expected at least 1")
    searchable = require_family(task, SearchTask)
    require_family(task, ValuedSearchTask if select == "value" else VotedSearchTask)
    root = SearchNode(searchable.initial_state(problem))
    options = {**options, "temperature": temperature}
    async with method_session(engine, "", "tree_of_thoughts", **options) as session:
        tree = _Tree(session, searchable, problem, select, breadth, proposals, evaluations)
        best = await (tree.bfs(root) if search == "bfs" else tree.dfs(root, threshold))
        answer = searchable.solution(best.state) if best else None
        return MethodResult("tree_of_thoughts", answer or "", session.finish(), best.value if best else None)


@dataclass
class _Tree:
    session: MethodSession
    task: SearchTask[Any, Any]
    problem: Any
    select: Select
    breadth: int
    proposals: int
    evaluations: int

    @property
    def model(self) -> SearchModel:
        return SearchModel(self.session, self.task)

    async def bfs(self, root: SearchNode) -> SearchNode | None:
        """Algorithm 1: keep the best states of each level; stop at a level whose best state is a solution."""
        level = [root]
        for _ in range(self.task.max_steps):
            candidates = await self.expand(level)
            if self.select == "vote":
                valued = await self.vote(candidates)
            else:
                valued = await self.model.evaluate(candidates, self.evaluations)
            level = sorted(valued, key=lambda node: -node.value)[: self.breadth]
            if not level or self.is_solution(level[0]):
                break
        return next(filter(self.is_solution, level), None)

    async def dfs(self, node: SearchNode, threshold: float, depth: int = 0) -> SearchNode | None:
        """Algorithm 2: search the best child first, and backtrack where no child is above the threshold."""
        if self.is_solution(node):
            return node
        if depth == self.task.max_steps:
            return None
        children = await self.model.evaluate(await self.expand([node]), self.evaluations)
        for child in sorted(children, key=lambda child: -child.value):
            if child.value > threshold and (solution := await self.dfs(child, threshold, depth + 1)):
                return solution
        return None

    def is_solution(self, node: SearchNode) -> bool:
        return self.task.solution(node.state) is not None

    async def expand(self, level: Sequence[SearchNode]) -> list[SearchNode]:
        """The children of all nodes of a level, each state once."""
        width = self.session.affordable_width(len(level) * self.proposals, self.task.step_tokens)
        level = level[:width]
        proposals = await self.model.propose(level, width // len(level))
        children: dict[Any, SearchNode] = {}
        for node, completions in zip(level, proposals, strict=True):
            for child in self.model.children(node, completions):
                children.setdefault(child.state, child)
        return list(children.values())

    async def vote(self, nodes: Sequence[SearchNode]) -> list[SearchNode]:
        """The nodes with their shares of the model's votes; each vote sees all nodes."""
        if not nodes:
            return []
        task = require_family(self.task, VotedSearchTask)
        prompt = task.vote_prompt(self.problem, [task.show(node.state) for node in nodes])
        depends_on = tuple(completion for node in nodes for completion in node.depends_on)
        (replies,) = await self.session.samples([replace(prompt, depends_on=depends_on)], self.evaluations)
        votes = Counter(task.choice(completion.text, len(nodes)) for completion in replies)
        return [
            replace(node, depends_on=tuple(replies), value=votes[k] / len(replies))
            for k, node in enumerate(nodes)
        ]
