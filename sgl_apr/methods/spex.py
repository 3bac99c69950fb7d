"""SPEX: a tree search that expands the children of likely winners before all of a level has been judged."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
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

LABEL = "spex-style"  # of the three techniques of the paper it has one
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
    is proposed, and the most promising states of a level are expanded before all are judged. Expansions of states that turn
    out not to be among the best are cut. The label of the result says how many there were, and how many tokens they had
    written. It pays where the engine is not full: elsewhere it takes time from what is needed.

    Of the paper's three techniques this is the first, speculative path selection. States are ranked by the values that are
    known so far (`LevelRanking`, our rule). What is speculated is not shared out among queries, and no branch ends before its
    level is judged, so that the tree stays that of `tree_of_thoughts`.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `ValuedSearchTask`.
        breadth: States that are kept at each level.
        proposals: Samples of the next step from each state.
        evaluations: Samples of the value of each state.
        speculation: How many states of a level are expanded before all are judged. It bounds the work that is lost: that many
            times `proposals` times the tokens of a step.
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
class LevelRanking:
    """Which nodes of a level will be kept, as far as their values are known.

    Attributes:
        parents: The states whose children the level has, in order.
        breadth: How many nodes are kept: those of the highest value, the earlier one of two that are equal.
        children: The children of those parents that are expanded.
        values: The nodes whose value is known, by state.
    """

    parents: Sequence[Hashable]
    breadth: int
    children: dict[Hashable, list[SearchNode]] = field(default_factory=dict)
    values: dict[Hashable, SearchNode] = field(default_factory=dict)

    def known(self) -> list[SearchNode]:
        """The children so far, in order, each state once."""
        nodes = dict[Hashable, SearchNode]()
        for parent in self.parents:
            for child in self.children.get(parent, ()):
                nodes.setdefault(child.state, child)
        return list(nodes.values())

    def by_expected_rank(self) -> list[SearchNode]:
        """The nodes so far, the most promising first; those that cannot be kept any more are left out.

        The expected rank of a node counts the known values that beat its own, and for each value that is not known the
        chance that it does, by Laplace's rule of succession from the known ones. Parents that are not expanded yet are
        taken to have as many children as the others. A node whose own value is not known may have any of the known ones.
        """
        nodes = self.known()
        if not self.values:
            return nodes
        missing = len(nodes) * (len(self.parents) / len(self.children) - 1)
        ranks = []
        for place, node in enumerate(nodes):
            known = self.values.get(node.state)
            values = [known.value] if known else [each.value for each in self.values.values()]
            ranks.append((fmean(self._rank(place, value, nodes, missing) for value in values), place))
        return [nodes[place] for _, place in sorted(ranks) if not self.is_lost(nodes[place].state)]

    def is_lost(self, state: Hashable) -> bool:
        """Whether as many nodes as are kept have higher values."""
        own = self.values.get(state)
        return (
            own is not None and sum(each.value > own.value for each in self.values.values()) >= self.breadth
        )

    def _rank(self, place: int, value: float, nodes: Sequence[SearchNode], missing: float) -> float:
        """The expected rank of the node in a place, if it has a value."""
        others = [each.value for state, each in self.values.items() if state != nodes[place].state]
        above, equal = sum(v > value for v in others), sum(v == value for v in others)
        rank = missing * (above + equal + 1) / (len(others) + 2)
        for k, node in enumerate(nodes):
            if k == place:
                continue
            if known := self.values.get(node.state):
                rank += known.value > value or (known.value == value and k < place)
            else:
                rank += (above + equal * (k < place) + 1) / (len(others) + 2)
        return rank


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
        ranking = LevelRanking([node.state for node in level], self.breadth)
        evaluations = dict[Hashable, asyncio.Task[SearchNode]]()
        started = 0

        def speculate() -> None:
            nonlocal started
            for state in [state for state in self.expansions if ranking.is_lost(state)]:
                self.cut(state)
            for likely in ranking.by_expected_rank():
                if (
                    started < speculation
                    and likely.state not in self.expansions
                    and not self.is_solution(likely)
                ):
                    started += 1
                    self.expand(tasks, likely, self.proposals, expects_cancel=True)

        async def evaluate(child: SearchNode) -> SearchNode:
            (node,) = await self.model.evaluate([child], self.evaluations)
            ranking.values[node.state] = node
            speculate()
            return node

        async def children_of(node: SearchNode) -> None:
            (replies,) = await self.expansions[node.state].task
            children = ranking.children[node.state] = self.model.children(node, replies)
            for child in children:
                if child.state not in evaluations:
                    evaluations[child.state] = tasks.create_task(evaluate(child))
            speculate()

        for task in [tasks.create_task(children_of(node)) for node in level]:
            await task
        for node in level:
            del self.expansions[node.state]
        return [await evaluations[child.state] for child in ranking.known()]

    def expand(
        self, tasks: asyncio.TaskGroup, node: SearchNode, samples: int, *, expects_cancel: bool
    ) -> None:
        """Start to propose the next steps of a node, unless that was started before."""
        if node.state in self.expansions:
            return
        scope = CancelScope(self.session.root.sequence.scope, expects_cancel=expects_cancel)
        task = tasks.create_task(self.model.propose([node], samples, scope=scope))
        self.expansions[node.state] = _Expansion(scope, task)

    def cut_all_but(self, level: list[SearchNode]) -> None:
        """Cut the expansions that nobody needs any more."""
        needed = {node.state for node in level}
        for state in [state for state in self.expansions if state not in needed]:
            self.cut(state)

    def cut(self, state: Hashable) -> None:
        """Cut the expansion of a state that is not among the best of its level."""
        if self.expansions[state].scope.expects_cancel:
            expansion = self.expansions.pop(state)
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
        return f"{LABEL}, {count} of its expansions in vain ({tokens} tokens decoded)" if count else LABEL

    def is_solution(self, node: SearchNode) -> bool:
        return self.task.solution(node.state) is not None
