"""What a supervised run minimizes: by default the negative log-likelihood of what was decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.collate import log_probabilities, to_device
from sgl_apr.training.config import Steps
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


def _weights(tree: TrainingTree) -> np.ndarray[Any, Any]:
    return np.ones(len(tree.sources), dtype=np.float32) if tree.weights is None else tree.weights


class Likelihood:
    """The mean negative log-probability of the decoded tokens, those of tags weighted.

    Args:
        examples: The training trees.
        model: The model, on its device.
        tokenizer: Its tokenizer; added tokens are tags.
        steps: `tag_weight` and `width_weight`.
    """

    def __init__(self, examples: Examples, model: Any, tokenizer: HfTokenizer, steps: Steps) -> None:
        self.examples, self._steps = examples, steps
        self._collate = collator_for(model, min(tokenizer.eos_ids))
        self._tags = torch.tensor([*tokenizer.added_tokens.values()], device=model.device)
        self._line_break = tokenizer.encode("\n")[-1]

    def loss(self, model: Any, rows: Sequence[Sequence[TrainingTree]]) -> tuple[Tensor, int]:
        each = [[_weights(tree) for tree in row] for row in rows]
        batch = to_device(self._collate(rows, each), model.device)
        values, weights = log_probabilities(model, batch), batch["weights"]
        weights = torch.where(torch.isin(batch["targets"], self._tags), self._steps.tag_weight, weights)
        weights = torch.where(self._decides_width(batch), self._steps.width_weight, weights)
        return -(values * weights).sum() / weights.sum(), len(values)

    def _decides_width(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(m,), whether a target is a tag after a tag: another branch, or the end of the fork. Line breaks between do not count."""
        ids, rows, sources = batch["input_ids"], batch["rows"], batch["sources"]
        last, before = ids[rows, sources], ids[rows, (sources - 1).clamp(min=0)]
        after_tag = torch.isin(torch.where(last == self._line_break, before, last), self._tags)
        return after_tag & torch.isin(batch["targets"], self._tags)
