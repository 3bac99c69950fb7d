"""Distillation of the text join into the KV join, for a model that was trained on text joins or on none.

After a KV join the branches lie at the same positions, and none has seen another. The teacher is the model itself, as it
is at the start, after a text join of the same branches; the student learns to predict the same (Kullback-Leibler divergence, as in
context distillation, arXiv 2209.15189).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sgl_apr.training.collate import target_logits, to_device
from sgl_apr.training.device import collator_for
from sgl_apr.training.examples import Examples
from sgl_apr.training.training_tree import TrainingTree, build_training_tree
from sgl_apr.training.trie import Ints
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class JoinPair:
    """One trajectory under both joins, whose losses are in the same order.

    Attributes:
        kv: Its blocks are joined in the KV cache.
        text: Its blocks are joined as text.
        after_join: (m,), whether a target follows a join.
    """

    kv: TrainingTree
    text: TrainingTree
    after_join: npt.NDArray[np.bool_]

    @classmethod
    def from_trajectory(cls, trajectory: Trajectory, eos: int) -> JoinPair:
        """The pair of a trajectory whose branches see the text before the fork.

        Raises:
            AprError: As `build_training_tree`.
        """
        kv, text = (
            build_training_tree([trajectory], eos=eos, join="kv"),
            build_training_tree([trajectory], eos=eos, join="text"),
        )
        joined = [
            any(len(trajectory.spans[a].parents) > 1 for a in (*trajectory.ancestors(i), i))
            for i in range(len(trajectory.spans))
        ]
        return cls(kv, text, np.asarray(joined, dtype=bool)[kv.spans])

    @property
    def tokens(self) -> int:
        """Tokens of the longer tree, that of the text join."""
        return self.text.tokens

    @property
    def sources(self) -> Ints:
        """As `TrainingTree.sources`, of the KV join."""
        return self.kv.sources


@dataclass(frozen=True, slots=True)
class JoinPairs:
    """The pairs of the trajectories with forks among some examples."""

    examples: Examples
    eos: int

    def chunk(self, number: int) -> list[JoinPair]:
        """The pairs of one chunk."""
        return [JoinPair.from_trajectory(t, self.eos) for t in self.trajectories(number) if t.blocks]

    def trajectories(self, number: int) -> Iterable[Trajectory]:
        """The trajectories of one chunk."""
        return self.examples.trajectories(number)


class JoinDistillation:
    """The divergence of the teacher after a text join from the student after a KV join.

    The loss is the mean over the tokens after a join, plus the mean over all other tokens, which keeps the student from changing
    before it.

    Args:
        examples: Trajectories with forks; they are those that the student will see at best, of its own.
        teacher: The model at the start, on its device.
        pad: Token id of padding, and of the end of a text.
    """

    def __init__(self, examples: Examples, teacher: Any, pad: int) -> None:
        self.examples = JoinPairs(examples, pad)
        self._teacher, self._collate = teacher.eval(), collator_for(teacher, pad)

    def loss(self, model: Any, rows: Sequence[Sequence[JoinPair]]) -> tuple[Tensor, int]:
        pairs = [pair for row in rows for pair in row]
        with torch.no_grad():
            batch = to_device(self._collate([pair.text for pair in pairs]), model.device)
            expected = target_logits(self._teacher, batch).log_softmax(-1)
        batch = to_device(self._collate([pair.kv for pair in pairs]), model.device)
        found = target_logits(model, batch).log_softmax(-1)
        divergence = (expected.exp() * (expected - found)).sum(-1)
        after = torch.from_numpy(np.concatenate([pair.after_join for pair in pairs])).to(divergence.device)
        parts = [divergence[chosen].mean() for chosen in (after, ~after) if chosen.any()]
        return torch.stack(parts).sum(), int(after.sum())
