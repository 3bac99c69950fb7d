"""SPEX: a tree search that expands the children of likely winners before all of a level has been judged."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.prompt import Completion
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import MethodSession, method_session
from sgl_apr.methods.task import SearchTask, Task, ValuedSearchTask, require_family
from sgl_apr.methods.tree_search import SearchModel, SearchNode
from sgl_apr.runtime.branch_group import first_error
from sgl_apr.runtime.cancel_scope import CancelScope

LIMIT = "speculation"  # what ends an expansion that was started in vain, in `Trajectory.limits`


async def spex(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    breadth: int = 5,
    proposals: int = 3,
    evaluations: int = 3,
    speculation: int = 5,
    temperature: float = 0.7,
    **options: Any,
) -> MethodResult:
    """Tree of thoughts by breadth-first search, with speculative expansion (SPEX, arXiv 2605.10195).

    It searches the tree that `tree_of_thoughts` searches with the same seed, and waits less: a state is judged as soon as it
    is proposed, and expanded as soon as it is likely to be among the best of its level. Expansions of states that turn out
    not to be are cut. The label of the result says how many there were, and how many tokens they had written.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `ValuedSearchTask`.
        breadth: States that are kept at each level.
        proposals: Samples of the next step from each state.
        evaluations: Samples of the value of each state.
        speculation: How many states of a level may be expanded before all are judged. It bounds the work that is lost: that
            many times `proposals` times the tokens of a step.
        temperature: Sampling temperature.
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `ValuedSearchTask`.
    """
    for name, value in (("breadth", breadth), ("proposals", proposals), ("evaluations", evaluations)):
        if value < 1:
            raise AprError(f"{name}={value}, expected at least 1")
    if speculation < 0:
        raise AprError(f"speculation={speculation}, expected 0 or more")
    searchable = require_family(require_family(task, SearchTask), ValuedSearchTask)
    root = SearchNode(searchable.initial_state(problem))
    options = {**options, "temperature": temperature}
    async with method_session(engine, "", "spex", **options) as session:
        search = _Search(session, searchable, breadth, proposals, evaluations, speculation)
        try:
            best = await search.run(root)
        except BaseExceptionGroup as failed:
            error = first_error(failed)
            raise error from error.__cause__
        answer = searchable.solution(best.state) if best else None
        return MethodResult(
            "spex", answer or "", session.finish(), best.value if best else None, search.label
        )


@dataclass(eq=False)
class _Expansion:
    """The proposals of one state. Those that nobody needs any more are cut by their scope."""

    scope: CancelScope
    task: asyncio.Task[list[list[Completion]]]


@dataclass
class _Search:
    session: MethodSession
    task: ValuedSearchTask[Any, Any]
    breadth: int
    proposals: int
    evaluations: int
    speculation: int
    expansions: dict[Hashable, _Expansion] = field(default_factory=dict)
    lost: list[_Expansion] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = SearchModel(self.session, self.task)

    async def run(self, root: SearchNode) -> SearchNode | None:
        """As `tree_of_thoughts`: keep the best states of each level; stop at a level whose best state is a solution."""
        level = [root]
        async with asyncio.TaskGroup() as tasks:
            for depth in range(self.task.max_steps):
                is_last = depth + 1 == self.task.max_steps
                valued = await self.next_level(tasks, level, 0 if is_last else self.speculation)
                level = sorted(valued, key=lambda node: -node.value)[: self.breadth]
                done = not level or self.is_solution(level[0])
                self.cut_all_but([] if done else level)
                if done:
                    break
        return next(filter(self.is_solution, level), None)

    async def next_level(
        self, tasks: asyncio.TaskGroup, level: list[SearchNode], speculation: int
    ) -> list[SearchNode]:
        """The children of all nodes of a level with their values, in the order of `tree_of_thoughts`."""
        width = self.session.affordable_width(len(level) * self.proposals, self.task.step_tokens)
        level, samples = level[:width], max(1, width // len(level))
        for node in level:
            self.expand(tasks, node, samples, expects_cancel=False)
        judged = dict[Hashable, asyncio.Task[SearchNode]]()
        known = list[SearchNode]()  # those whose value is known
        started = 0

        def judge(child: SearchNode) -> None:
            async def evaluate() -> SearchNode:
                nonlocal started
                (node,) = await self.model.evaluate([child], self.evaluations)
                known.append(node)
                for likely in self.likely_winners(known, len(judged)):
                    if started < speculation and likely.state not in self.expansions:
                        started += 1
                        self.expand(tasks, likely, self.proposals, expects_cancel=True)
                return node

            if child.state not in judged:
                judged[child.state] = tasks.create_task(evaluate())

        async def children_of(node: SearchNode) -> list[SearchNode]:
            (replies,) = await self.expansions[node.state].task
            children = self.model.children(node, replies)
            for child in children:
                judge(child)
            return children

        expanding = [tasks.create_task(children_of(node)) for node in level]
        children = [child for each in expanding for child in await each]
        for node in level:
            del self.expansions[node.state]
        return [await judged[state] for state in dict.fromkeys(child.state for child in children)]

    def expand(
        self, tasks: asyncio.TaskGroup, node: SearchNode, samples: int, *, expects_cancel: bool
    ) -> None:
        """Start to propose the next steps of a node, unless that was started before."""
        if node.state in self.expansions:
            return
        scope = CancelScope(self.session.root.sequence.scope, expects_cancel=expects_cancel)
        task = tasks.create_task(self.model.propose([node], samples, scope=scope))
        self.expansions[node.state] = _Expansion(scope, task)

    def likely_winners(self, known: list[SearchNode], count: int) -> list[SearchNode]:
        """Of the nodes whose value is known, those in the part that will be kept, if the others are alike.

        Args:
            known: Those nodes.
            count: How many nodes the level has so far.
        """
        kept = round(self.breadth * len(known) / max(count, len(known)))
        ranked = sorted(known, key=lambda node: -node.value)[:kept]
        return [node for node in ranked if node.value > 0 and not self.is_solution(node)]

    def cut_all_but(self, level: list[SearchNode]) -> None:
        """Cut the expansions that nobody needs any more."""
        needed = {node.state for node in level}
        for state in [state for state in self.expansions if state not in needed]:
            expansion = self.expansions.pop(state)
            if expansion.scope.expects_cancel:
                expansion.scope.cancel("aborted", LIMIT)
                self.lost.append(expansion)

    @property
    def label(self) -> str:
        """What was run, with the work that was lost. Call it when the search is done."""
        tokens = sum(
            reply.sequence.tokens_used
            for each in self.lost
            for replies in each.task.result()
            for reply in replies
        )
        count = len(self.lost)
        return f"exact, {count} of its expansions in vain ({tokens} tokens decoded)" if count else "exact"

    def is_solution(self, node: SearchNode) -> bool:
        return self.task.solution(node.state) is not None
