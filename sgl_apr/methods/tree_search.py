"""Steps that a model proposes and values, for many states at once; tree of thoughts and MCTS choose among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.session import MethodSession
from sgl_apr.methods.task import SearchTask, ValuedSearchTask, require_family
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.seeds import derive_seed


@dataclass(frozen=True)
class SearchNode:
    """A state of a search.

    Attributes:
        state: The state, of the task's own type.
        depends_on: The completions that led to the state or to its value.
        value: The value of the state.
    """

    state: Any
    depends_on: tuple[Completion, ...] = ()
    value: float = 0.0


@dataclass(frozen=True)
class SearchModel:
    """The model as proposer and judge of steps, in one session for one task."""

    session: MethodSession
    task: SearchTask[Any, Any]

    async def propose(
        self, nodes: Sequence[SearchNode], samples: int, *, scope: CancelScope | None = None
    ) -> list[list[Completion]]:
        """Sample the next step `samples` times from each node. Cancelling `scope` cuts them."""
        prompts = [
            self._seeded(self.task.proposal_prompt(node.state), "propose", node.state, node.depends_on)
            for node in nodes
        ]
        return await self.session.samples(prompts, samples, scope=scope)

    def children(self, node: SearchNode, completions: Sequence[Completion]) -> list[SearchNode]:
        """The nodes that completions about a node lead to, each state once."""
        children: dict[Any, SearchNode] = {}
        for completion in completions:
            for state in self.task.expand(node.state, completion.text):
                children.setdefault(state, SearchNode(state, (completion,)))
        return list(children.values())

    async def evaluate(self, nodes: Sequence[SearchNode], samples: int) -> list[SearchNode]:
        """The nodes with their values: the mean of `samples` values by the model; a completion without text counts 0."""
        task = require_family(self.task, ValuedSearchTask)
        evaluations = [(node, task.evaluate(node.state)) for node in nodes]
        prompts = [
            self._seeded(prompt, "evaluate", node.state, node.depends_on)
            for node, prompt in evaluations
            if isinstance(prompt, Prompt)
        ]
        replies = iter(await self.session.samples(prompts, samples))
        return [
            _mean(task, node, next(replies))
            if isinstance(evaluation, Prompt)
            else replace(node, value=evaluation)
            for node, evaluation in evaluations
        ]

    def _seeded(self, prompt: Prompt, what: str, state: Any, depends_on: tuple[Completion, ...]) -> Prompt:
        """A prompt whose samples depend on the state that it is about, and not on when it is sent."""
        seed = derive_seed(self.session.requests.seed, what, repr(state))
        return replace(prompt, depends_on=depends_on, seed=seed)


def _mean(
    task: ValuedSearchTask[Any, Any], node: SearchNode, completions: Sequence[Completion]
) -> SearchNode:
    value = fmean(task.value(node.state, c) if c.text else 0.0 for c in completions)
    return replace(node, depends_on=tuple(completions), value=value)
