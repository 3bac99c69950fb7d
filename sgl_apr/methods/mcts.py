"""Monte Carlo tree search, several leaves at once. The tree is TreeQuest's; what a step is, and its worth, the task's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from math import sqrt
from typing import TYPE_CHECKING, Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import MethodSession, method_session
from sgl_apr.methods.task import Task
from sgl_apr.methods.tree_search import Node as Reached
from sgl_apr.methods.tree_search import SearchModel

if TYPE_CHECKING:
    from treequest.algos.standard_mcts import MCTSState
    from treequest.algos.tree import Node

ACTION = "step"  # there is one kind of them


async def mcts(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any, Any],
    simulations: int = 10,
    leaves: int = 4,
    proposals: int = 1,
    evaluations: int = 1,
    exploration: float = sqrt(2),
    temperature: float = 0.7,
    **options: Any,
) -> MethodResult:
    """UCT (Kocsis 2006) over steps that a model proposes, with values that it gives (RAP: Hao 2023, arXiv 2305.14992).

    simulations: leaves that are selected in all (10 in RAP's published code). leaves: how many at once at most; a
    leaf that was selected counts as visited and worth nothing until the others are (virtual loss: Chaslot 2008,
    parallel tree search). proposals: samples of the next step from each; a sample may name several, and every step becomes a child.
    evaluations: samples of the value of a child (a rollout, or a judgement, as its task has it), whose mean, cut to
    0..1, is backed up. exploration: the weight of UCB1 (sqrt 2: Auer 2002), by TreeQuest's formula, which weighs it by
    the softmax of the values of siblings. It ends where a state is an answer of value 1, and at the budget.
    """
    for name, value in (("simulations", simulations), ("leaves", leaves), ("proposals", proposals)):
        if value < 1:
            raise AprError(f"{name}={value}, expected at least 1")
    options = {**options, "temperature": temperature}
    begin = Reached(task.begin(problem))
    async with method_session(engine, "", "mcts", **options) as thoughts:
        search = _Search(thoughts, task, begin, leaves, proposals, evaluations, exploration)
        best = await search.run(simulations)
        answer = task.solved(best.state) if best else None
        return MethodResult("mcts", answer or "", thoughts.finish(), best.value if best else None)


class _Search:
    def __init__(
        self,
        thoughts: MethodSession,
        task: Task[Any, Any],
        begin: Reached,
        leaves: int,
        proposals: int,
        evaluations: int,
        exploration: float,
    ) -> None:
        from treequest import StandardMCTS

        self.thoughts, self.task, self.begin = thoughts, task, begin
        self.steps = SearchModel(thoughts, task)
        self.most, self.proposals, self.evaluations = leaves, proposals, evaluations
        self.algorithm: StandardMCTS[Reached] = StandardMCTS(
            samples_per_action=1, exploration_weight=exploration
        )
        self.tree: MCTSState[Reached] = self.algorithm.init_tree()
        self.barren = set[int]()  # leaves from which no step leads on

    async def run(self, simulations: int) -> Reached | None:
        """The best answer that any state came to."""
        while simulations > 0:
            selected = self.selected(min(simulations, self.most))
            simulations -= len(selected)
            open_ = [leaf for leaf in selected if not self.ended(leaf)]
            for leaf in (leaf for leaf in selected if self.ended(leaf)):
                back_up(self.tree, leaf, 1, self.reached(leaf).value if self.solved(leaf) else 0.0)
            if not open_:
                continue
            width = self.thoughts.affordable_width(len(open_) * self.proposals, self.task.step)
            open_ = open_[:width]
            said = await self.steps.proposed([self.reached(leaf) for leaf in open_], width // len(open_))
            children = [
                self.steps.children(self.reached(leaf), own) for leaf, own in zip(open_, said, strict=True)
            ]
            for leaf, found in zip(open_, await self.evaluate(children), strict=True):
                self.told(leaf, found)
            cut = all(t.finish in ("length", "timeout") and not t.text for own in said for t in own)
            if cut or any(child.value >= 1 for child in self.answers()):
                break
        return max(self.answers(), key=lambda child: child.value, default=None)

    def selected(self, most: int) -> list[Node[Reached]]:
        """Leaves by UCT, each once; less than `most` where it comes to the same again."""
        found = dict[int, Any]()
        visited = list[Any]()
        for _ in range(most):
            _, (trial,) = self.algorithm.ask_batch(self.tree, 1, [ACTION])
            self.tree.trial_store.next_nodes.clear()  # else it would go on asking for this one
            leaf = self.tree.tree.get_node(trial.node_to_expand)
            found[leaf.expand_idx] = leaf
            visited.append(leaf)
            back_up(self.tree, leaf, 1, 0.0)
        for leaf in visited:
            back_up(self.tree, leaf, -1, 0.0)
        return list(found.values())

    def reached(self, leaf: Node[Reached]) -> Reached:
        return leaf.state or self.begin

    def solved(self, leaf: Node[Reached]) -> bool:
        return self.task.solved(self.reached(leaf).state) is not None

    def ended(self, leaf: Node[Reached]) -> bool:
        """Whether nothing is to be asked about it."""
        return leaf.expand_idx in self.barren or leaf.depth >= self.task.thoughts or self.solved(leaf)

    def answers(self) -> list[Reached]:
        pairs = self.algorithm.get_state_score_pairs(self.tree)
        return [child for child, _ in pairs if self.task.solved(child.state) is not None]

    async def evaluate(self, families: Sequence[Sequence[Reached]]) -> list[list[Reached]]:
        """With their values, cut to 0..1, which the model gives to all of them at once."""
        flat = [child for children in families for child in children]
        said = iter(await self.steps.evaluate(flat, self.evaluations))
        cut = (replace(child, value=min(1.0, max(0.0, child.value))) for child in said)
        return [list(islice(cut, len(children))) for children in families]

    def told(self, leaf: Node[Reached], children: Sequence[Reached]) -> None:
        """Grow the tree by them, and back up what they are worth; a leaf without any is worth nothing."""
        if not children:
            self.barren.add(leaf.expand_idx)
            back_up(self.tree, leaf, 1, 0.0)
        self.tree.trial_store.fill_nodes_queue([(leaf, ACTION)] * len(children))
        trials = self.tree.trial_store.get_batch_from_queue(len(children))
        for trial, child in zip(trials, children, strict=True):
            self.algorithm.tell(self.tree, trial.trial_id, (child, child.value))


def back_up(tree: MCTSState[Any], leaf: Node[Any], visits: int, value: float) -> None:
    """Count visits of a leaf, and of all that it stands under, which came to `value` in all."""
    node: Node[Any] | None = leaf
    while node is not None:
        tree.visit_counts[node.expand_idx] = tree.visit_counts.get(node.expand_idx, 0) + visits
        tree.value_sums[node.expand_idx] = tree.value_sums.get(node.expand_idx, 0.0) + value
        node = node.parent
