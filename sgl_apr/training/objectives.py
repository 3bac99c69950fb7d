"""What a supervised run minimizes: by default the negative log-likelihood of what was decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sgl_apr.training.collate import log_probabilities, to_device
from sgl_apr.training.device import collator_for
from sgl_apr.training.examples import Examples
from sgl_apr.training.training_tree import TrainingTree


class Objective(Protocol):
    """An objective, and the examples that it is computed on."""

    @property
    def examples(self) -> Examples:
        """What `loss` takes, in chunks."""
        ...

    def loss(self, model: Any, rows: Sequence[Sequence[Any]]) -> tuple[Tensor, int]:
        """The loss of a batch, given as rows of examples, and of how many tokens it is the mean."""
        ...


class Likelihood:
    """The mean negative log-probability of the decoded tokens, those of tags weighted.

    Args:
        examples: The training trees.
        model: The model, on its device.
        pad: Token id of padding.
        tags: Token ids of the tags.
        tag_weight: Their weight.
    """

    def __init__(
        self, examples: Examples, model: Any, pad: int, tags: Sequence[int], tag_weight: float
    ) -> None:
        self.examples, self.tag_weight = examples, tag_weight
        self._collate, self._tags = collator_for(model, pad), torch.tensor(tags, device=model.device)

    def loss(self, model: Any, rows: Sequence[Sequence[TrainingTree]]) -> tuple[Tensor, int]:
        batch = to_device(self._collate(rows), model.device)
        values = log_probabilities(model, batch)
        weights = torch.where(torch.isin(batch["targets"], self._tags), self.tag_weight, 1.0)
        return -(values * weights).sum() / weights.sum(), len(values)
