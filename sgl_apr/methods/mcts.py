"""Monte Carlo tree search with several leaves in parallel; the tree is TreeQuest's, steps and values are the task's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from math import sqrt
from typing import TYPE_CHECKING, Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError, require_extra
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import MethodSession, method_session
from sgl_apr.methods.task import SearchTask, Task, ValuedSearchTask, require_family
from sgl_apr.methods.tree_search import SearchModel, SearchNode

if TYPE_CHECKING:
    from treequest.algos.standard_mcts import MCTSState
    from treequest.algos.tree import Node

ACTION = "step"  # the only kind of action


async def mcts(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    simulations: int = 10,
    leaves: int = 4,
    proposals: int = 1,
    evaluations: int = 1,
    exploration: float = sqrt(2),
    temperature: float = 0.7,
    **options: Any,
) -> MethodResult:
    """UCT (Kocsis 2006) over steps that a model proposes, with values that it gives (RAP: Hao 2023, arXiv 2305.14992).

    The search ends when a state is an answer of value 1, or at the budget.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `ValuedSearchTask`.
        simulations: Leaves that are selected in total (10 in RAP's published code).
        leaves: Leaves that are expanded in parallel. A selected leaf counts as visited with value 0 until all are
            selected (virtual loss: Chaslot 2008, parallel tree search).
        proposals: Samples of the next step from each leaf; one sample may name several, and every step becomes a child.
        evaluations: Samples of the value of a child (a rollout or a judgement, as the task defines it). Their mean,
            clipped to 0..1, is backed up.
        exploration: The weight of UCB1 (sqrt 2: Auer 2002) in TreeQuest's formula, which also weighs it by the softmax
            of the values of siblings.
        temperature: Sampling temperature.
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `ValuedSearchTask`.
    """
    counts = {
        "simulations": simulations,
        "leaves": leaves,
        "proposals": proposals,
        "evaluations": evaluations,
    }
    for name, value in counts.items():
        if value < 1:
            raise AprError(f"{name}={value}, expected at least 1")
    searchable = require_family(require_family(task, SearchTask), ValuedSearchTask)
    options = {**options, "temperature": temperature}
    root = SearchNode(searchable.initial_state(problem))
    async with method_session(engine, "", "mcts", **options) as session:
        search = _Search(session, searchable, root, leaves, proposals, evaluations, exploration)
        best = await search.run(simulations)
        answer = searchable.solution(best.state) if best else None
        return MethodResult("mcts", answer or "", session.finish(), best.value if best else None)


class _Search:
    def __init__(
        self,
        session: MethodSession,
        task: SearchTask[Any, Any],
        root: SearchNode,
        leaves: int,
        proposals: int,
        evaluations: int,
        exploration: float,
    ) -> None:
        require_extra("treequest", "mcts", "the method mcts needs treequest")
        from treequest import StandardMCTS

        self.session, self.task, self.root = session, task, root
        self.model = SearchModel(session, task)
        self.max_leaves, self.proposals, self.evaluations = leaves, proposals, evaluations
        self.algorithm: StandardMCTS[SearchNode] = StandardMCTS(
            samples_per_action=1, exploration_weight=exploration
        )
        self.tree: MCTSState[SearchNode] = self.algorithm.init_tree()
        self.dead_ends = set[int]()  # leaves without a next step

    async def run(self, simulations: int) -> SearchNode | None:
        """The best answer among all states."""
        while simulations > 0:
            selected = self.select(min(simulations, self.max_leaves))
            simulations -= len(selected)
            expandable = [leaf for leaf in selected if not self.is_terminal(leaf)]
            for leaf in (leaf for leaf in selected if self.is_terminal(leaf)):
                back_up(self.tree, leaf, 1, self.search_node(leaf).value if self.is_solution(leaf) else 0.0)
            if not expandable:
                continue
            width = self.session.affordable_width(len(expandable) * self.proposals, self.task.step_tokens)
            expandable = expandable[:width]
            nodes = [self.search_node(leaf) for leaf in expandable]
            replies = await self.model.propose(nodes, width // len(nodes))
            children = [self.model.children(node, own) for node, own in zip(nodes, replies, strict=True)]
            for leaf, valued in zip(expandable, await self.evaluate(children), strict=True):
                self.add_children(leaf, valued)
            exhausted = all(t.finish in ("length", "timeout") and not t.text for own in replies for t in own)
            if exhausted or any(node.value >= 1 for node in self.answers()):
                break
        return max(self.answers(), key=lambda node: node.value, default=None)

    def select(self, count: int) -> list[Node[SearchNode]]:
        """Up to `count` leaves by UCT, each once; fewer if UCT selects a leaf again."""
        leaves = dict[int, Any]()
        visited = list[Any]()
        for _ in range(count):
            _, (trial,) = self.algorithm.ask_batch(self.tree, 1, [ACTION])
            self.tree.trial_store.next_nodes.clear()  # otherwise it would return this trial again
            leaf = self.tree.tree.get_node(trial.node_to_expand)
            leaves[leaf.expand_idx] = leaf
            visited.append(leaf)
            back_up(self.tree, leaf, 1, 0.0)
        for leaf in visited:
            back_up(self.tree, leaf, -1, 0.0)
        return list(leaves.values())

    def search_node(self, leaf: Node[SearchNode]) -> SearchNode:
        return leaf.state or self.root

    def is_solution(self, leaf: Node[SearchNode]) -> bool:
        return self.task.solution(self.search_node(leaf).state) is not None

    def is_terminal(self, leaf: Node[SearchNode]) -> bool:
        """Whether the leaf cannot be expanded."""
        too_deep = leaf.depth >= self.task.max_steps
        return leaf.expand_idx in self.dead_ends or too_deep or self.is_solution(leaf)

    def answers(self) -> list[SearchNode]:
        pairs = self.algorithm.get_state_score_pairs(self.tree)
        return [node for node, _ in pairs if self.task.solution(node.state) is not None]

    async def evaluate(self, families: Sequence[Sequence[SearchNode]]) -> list[list[SearchNode]]:
        """The families with values clipped to 0..1; the model values all of them in parallel."""
        children = [child for family in families for child in family]
        valued = iter(await self.model.evaluate(children, self.evaluations))
        clipped = (replace(child, value=min(1.0, max(0.0, child.value))) for child in valued)
        return [list(islice(clipped, len(family))) for family in families]

    def add_children(self, leaf: Node[SearchNode], children: Sequence[SearchNode]) -> None:
        """Add children to a leaf and back up their values; a leaf without any is a dead end of value 0."""
        if not children:
            self.dead_ends.add(leaf.expand_idx)
            back_up(self.tree, leaf, 1, 0.0)
        self.tree.trial_store.fill_nodes_queue([(leaf, ACTION)] * len(children))
        trials = self.tree.trial_store.get_batch_from_queue(len(children))
        for trial, child in zip(trials, children, strict=True):
            self.algorithm.tell(self.tree, trial.trial_id, (child, child.value))


def back_up(tree: MCTSState[Any], leaf: Node[Any], visits: int, value: float) -> None:
    """Add visits and a total value to a leaf and to all of its ancestors."""
    node: Node[Any] | None = leaf
    while node is not None:
        tree.visit_counts[node.expand_idx] = tree.visit_counts.get(node.expand_idx, 0) + visits
        tree.value_sums[node.expand_idx] = tree.value_sums.get(node.expand_idx, 0.0) + value
        node = node.parent
