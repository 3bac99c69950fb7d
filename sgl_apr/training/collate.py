"""Collate training trees into batches for a Hugging Face model, and compute the log-probabilities of their targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sgl_apr.errors import AprError
from sgl_apr.training.attention_mask import Visibility
from sgl_apr.training.block_attention import BLOCK_ATTENTION, VisibleBlocks
from sgl_apr.training.training_tree import TrainingTree


def pack_rows(trees: Iterable[TrainingTree], length: int) -> Iterator[list[TrainingTree]]:
    """Pack trees into rows of at most `length` tokens, first fit, in the order given.

    Raises:
        AprError: If a tree is longer than a row.
    """
    rows: list[list[TrainingTree]] = []
    for tree in trees:
        if tree.tokens > length:
            raise AprError(f"a tree of {tree.tokens} tokens does not fit into a row of {length}")
        row = next((r for r in rows if sum(t.tokens for t in r) + tree.tokens <= length), None)
        if row is None:
            rows.append(row := [])
        row.append(tree)
    yield from rows


@dataclass(frozen=True)
class Collator:
    """Collates rows of trees into one batch.

    A batch is a dict with `input_ids` and `position_ids` (rows, length), `attention_mask`, and for every loss its `rows`,
    `sources`, `targets` (token ids) and `weights` (1 unless given), all (m,). Where trees exclude tokens, `exclusion` (m,)
    is the number of the set of excluded tokens for each loss, and `exclusions` (p, 2) are pairs of such a number and a token id.

    Attributes:
        pad: Token id of padding.
        attention: "dense" is a matrix that any model takes with `attn_implementation="sdpa"` or "eager". "flex" is a
            `BlockMask` for "flex_attention", whose memory is linear. "later" is for trainers that move a batch to a device:
            in place of `attention_mask` the batch has `ends` and `joined` (see `Visibility`), of which
            `log_probabilities` makes a `BlockMask` on the device, or the visible blocks of a model with
            `attn_implementation=BLOCK_ATTENTION`.
    """

    pad: int = 0
    attention: Literal["dense", "flex", "later"] = "dense"

    def __call__(
        self,
        rows: Sequence[TrainingTree | Sequence[TrainingTree]],
        weights: Sequence[Sequence[np.ndarray[Any, Any]]] | None = None,
    ) -> dict[str, Any]:
        """Collate rows, each of one tree or several.

        Args:
            rows: The rows.
            weights: For every row and every tree in it, one weight for each of its losses.

        Raises:
            AprError: If the weights do not match the losses, or a tree excludes one of its targets.
        """
        packs = [[row] if isinstance(row, TrainingTree) else list(row) for row in rows]
        length = max(sum(t.tokens for t in pack) for pack in packs)
        ids = np.full((len(packs), length), self.pad, dtype=np.int64)
        positions = np.zeros((len(packs), length), dtype=np.int64)
        row_trees, loss_rows, sources, targets = [], [], [], []
        for k, pack in enumerate(packs):
            at = 0
            shifted = []
            for training_tree in pack:
                tree, end = training_tree.tree.shifted(at), at + training_tree.tokens
                ids[k, at:end] = tree.token_ids
                positions[k, at:end] = tree.positions
                loss_rows.append(np.full(len(training_tree.sources), k, dtype=np.int64))
                sources.append(training_tree.sources.astype(np.int64) + at)
                targets.append(training_tree.targets.astype(np.int64))
                shifted.append(tree)
                at = end
            row_trees.append(shifted[0].concatenate(shifted[1:]))
        visibility = Visibility.from_trees(row_trees, length)
        total = sum(len(s) for s in sources)
        trees = [tree for pack in packs for tree in pack]
        flat_weights = [w for row in weights or () for w in row]
        if weights is not None and [len(w) for w in flat_weights] != [len(s) for s in sources]:
            raise AprError("expected one weight for every loss of every tree")
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            **self._attention(visibility),
            **_exclusions(trees),
            "rows": torch.from_numpy(np.concatenate(loss_rows)),
            "sources": torch.from_numpy(np.concatenate(sources)),
            "targets": torch.from_numpy(np.concatenate(targets)),
            "weights": torch.from_numpy(np.concatenate(flat_weights).astype(np.float32))
            if weights is not None
            else torch.ones(total),
        }

    def _attention(self, visibility: Visibility) -> dict[str, Any]:
        if self.attention == "later":
            return {"ends": visibility.ends, "joined": visibility.joined}
        dense = self.attention == "dense"
        return {"attention_mask": visibility.dense_mask() if dense else visibility.block_mask()}


def _exclusions(trees: Sequence[TrainingTree]) -> dict[str, Tensor]:
    sets = sorted({tree.excluded for tree in trees})
    if sets == [()]:
        return {}
    if any(np.isin(tree.targets, tree.excluded).any() for tree in trees):
        raise AprError("a tree excludes a token that was decoded in it, expected others")
    pairs = [(k, token) for k, tokens in enumerate(sets) for token in tokens]
    index = [np.full(len(tree.sources), sets.index(tree.excluded), dtype=np.int64) for tree in trees]
    return {"exclusions": torch.tensor(pairs), "exclusion": torch.from_numpy(np.concatenate(index))}


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Move a batch to another device.

    Raises:
        AprError: If the batch has a `BlockMask`, whose function holds the tensors that it was made of.
    """
    if not all(isinstance(value, Tensor) for value in batch.values()):
        raise AprError('a batch with attention="flex" cannot be moved, expected "later" or "dense"')
    return {name: value.to(device) for name, value in batch.items()}


def target_logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The logits in the place of every target of a batch, (m, vocabulary) in float32, of a Hugging Face causal language model.

    A batch of one row goes through the model's own `forward`, which sharded models (FSDP) need. Tokens that a tree excludes have
    the logit -inf, as under the grammar's mask.
    """
    inputs = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        **_attention_inputs(model, batch),
        "use_cache": False,
    }
    if len(batch["input_ids"]) == 1:
        logits = model(**inputs, logits_to_keep=batch["sources"]).logits[0]
    else:
        hidden = model.model(**inputs).last_hidden_state
        logits = model.lm_head(
            hidden[batch["rows"], batch["sources"]]
        )  # only of tokens that predict a target
    logits = logits.float()
    if "exclusion" in batch:
        sets, ids = batch["exclusions"].unbind(1)
        table = torch.zeros(
            int(batch["exclusion"].max()) + 1, logits.shape[-1], dtype=torch.bool, device=logits.device
        )
        table[sets, ids] = True
        logits = logits.masked_fill(table[batch["exclusion"]], -torch.inf)
    return logits


def _attention_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    blocks = model.config._attn_implementation == BLOCK_ATTENTION
    if "attention_mask" in batch:
        if blocks:
            raise AprError(
                f'a model with attn_implementation={BLOCK_ATTENTION!r} takes no mask, expected batches of Collator(attention="later")'
            )
        return {"attention_mask": batch["attention_mask"]}
    visibility = Visibility(batch["ends"], batch["joined"])
    if blocks:
        return {"attention_mask": None, "visible_blocks": VisibleBlocks.from_visibility(visibility)}
    return {"attention_mask": visibility.block_mask()}


def log_probabilities(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The log-probability of every target of a batch, (m,), under a Hugging Face causal language model (`target_logits`)."""
    return select_log_probabilities(target_logits(model, batch), batch["targets"])


def select_log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each target, (m,), by its logits, (m, vocabulary)."""
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
