"""Structures to batches for a Hugging Face model, and what a model says of their targets; it trains nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sgl_apr.errors import AprError
from sgl_apr.training.attention_mask import Visibility
from sgl_apr.training.training_tree import TrainingTree


def pack_rows(structures: Iterable[TrainingTree], length: int) -> Iterator[list[TrainingTree]]:
    """Structures in rows of at most so many tokens, first fit, in the order given; `AprError` for one that is longer."""
    rows: list[list[TrainingTree]] = []
    for one in structures:
        if one.tokens > length:
            raise AprError(f"a structure of {one.tokens} tokens does not fit into a row of {length}")
        row = next((r for r in rows if sum(s.tokens for s in r) + one.tokens <= length), None)
        if row is None:
            rows.append(row := [])
        row.append(one)
    yield from rows


@dataclass(frozen=True)
class Collator:
    """Rows of structures as one batch.

    A batch has `input_ids` and `position_ids` (rows, length), `attention_mask`, and of every loss `rows`,
    `sources`, `targets` (token ids) and `weights` (1, unless the structures come with their own). `attention`
    is "dense", a matrix that any model takes with `attn_implementation="sdpa"` or "eager"; "flex", a
    `BlockMask` for "flex_attention", whose memory is linear; or "later", for trainers that move a batch to a
    device: it has `ends` and `joined` (see `Visibility`) instead, of which `log_probabilities` makes a `BlockMask` there.
    """

    pad: int = 0
    attention: Literal["dense", "flex", "later"] = "dense"

    def __call__(
        self,
        rows: Sequence[TrainingTree | Sequence[TrainingTree]],
        weights: Sequence[Sequence[np.ndarray[Any, Any]]] | None = None,
    ) -> dict[str, Any]:
        """`weights`: for every structure of every row one for each of its losses."""
        packs = [[row] if isinstance(row, TrainingTree) else list(row) for row in rows]
        length = max(sum(s.tokens for s in pack) for pack in packs)
        ids = np.full((len(packs), length), self.pad, dtype=np.int64)
        positions = np.zeros((len(packs), length), dtype=np.int64)
        trees, of, sources, targets = [], [], [], []
        for k, pack in enumerate(packs):
            at = 0
            shifted = []
            for one in pack:
                tree = one.tree.shifted(at)
                ids[k, at : at + one.tokens] = tree.token_ids
                positions[k, at : at + one.tokens] = tree.positions
                of.append(np.full(len(one.sources), k, dtype=np.int64))
                sources.append(one.sources.astype(np.int64) + at)
                targets.append(one.targets.astype(np.int64))
                shifted.append(tree)
                at += one.tokens
            trees.append(shifted[0].concatenate(shifted[1:]))
        sight = Visibility.from_trees(trees, length)
        total = sum(len(s) for s in sources)
        given = [w for row in weights or () for w in row]
        if weights is not None and [len(w) for w in given] != [len(s) for s in sources]:
            raise AprError("expected one weight for every loss of every structure")
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            **self._attention(sight),
            "rows": torch.from_numpy(np.concatenate(of)),
            "sources": torch.from_numpy(np.concatenate(sources)),
            "targets": torch.from_numpy(np.concatenate(targets)),
            "weights": torch.from_numpy(np.concatenate(given).astype(np.float32))
            if weights is not None
            else torch.ones(total),
        }

    def _attention(self, sight: Visibility) -> dict[str, Any]:
        if self.attention == "later":
            return {"ends": sight.ends, "joined": sight.joined}
        return {"attention_mask": sight.dense_mask() if self.attention == "dense" else sight.block_mask()}


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A batch on another device; `AprError` for a `BlockMask`, whose function holds the tensors that it was made of."""
    if not all(isinstance(value, Tensor) for value in batch.values()):
        raise AprError('attention="flex" stays where it was made, expected "later" or "dense"')
    return {name: value.to(device) for name, value in batch.items()}


def log_probabilities(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Of every target of a batch, (m,), under a Hugging Face causal language model.

    A batch of one row goes through the model's own `forward`, as what shards a model (FSDP) needs it.
    """
    made = "attention_mask" in batch
    sight = batch["attention_mask"] if made else Visibility(batch["ends"], batch["joined"]).block_mask()
    given = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": sight,
        "use_cache": False,
    }
    if len(batch["input_ids"]) == 1:
        logits = model(**given, logits_to_keep=batch["sources"]).logits[0]
    else:
        hidden = model.model(**given).last_hidden_state
        logits = model.lm_head(hidden[batch["rows"], batch["sources"]])  # of those that predict only
    return logits.float().log_softmax(-1).gather(-1, batch["targets"].unsqueeze(-1)).squeeze(-1)
