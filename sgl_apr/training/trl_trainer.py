"""TRL's `GRPOTrainer` on every row of forked trajectories. Importing this module imports TRL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from sgl_apr.errors import AprError
from sgl_apr.training.training_rows import TrainingRow

LEFT_PADDED = ("prompt_ids", "prompt_mask")  # all others are padded on the right
EMPTY_ROW = TrainingRow((0,), (0,), (0,), (None,))  # without a loss


class BranchGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # trl has no types
    """A `GRPOTrainer` that also trains on the rows of branches, with the advantage of the trajectory that they belong to.

    Use it with `rollout_func=TrlRollouts(...)`. Rewards and advantages are TRL's: one for each trajectory, in groups. Afterwards
    the batch gets the rows of `branch_rows`, so that each decoded token has one loss. The losses that sum over tokens
    (`loss_type` "dapo", the default, "cispo", "vespo") weight all of them alike; "grpo" averages within each row first.
    A micro step computes all rows of `per_device_train_batch_size` trajectories, in the mean: with much memory per row, choose 1
    and more `gradient_accumulation_steps`.
    The metric `branch_rows` is their mean number for a trajectory.

    Raises:
        AprError: For `use_vllm`, whose samples have no branches, and for a KL term (`beta`) with an adapter, whose reference policy
            is not a model of its own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.use_vllm:
            raise AprError("found use_vllm=True, expected rollout_func=TrlRollouts(...) without vLLM")
        if self.beta and self.ref_model is None:
            raise AprError(f"found beta={self.beta} with an adapter, expected beta=0 or a complete model")

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        owners, rows = list[int](), list[TrainingRow]()
        for k, example in enumerate(inputs):
            own: Sequence[TrainingRow] = example.get("branch_rows") or ()
            if batch["completion_mask"][k].any():  # not if TRL drops truncated completions, and this is one
                rows += own
                owners += [k] * len(own)
        self._metrics["train" if self.model.training else "eval"]["branch_rows"].append(
            self.accelerator.gather(torch.tensor(len(rows) / len(inputs), device=self.accelerator.device))
            .mean()
            .item()
        )
        # TRL splits the batch into equal parts.
        parts = self.args.steps_per_generation if self.model.training else 1
        missing = -(len(inputs) + len(rows)) % parts
        return self._with_rows(batch, [*rows, *[EMPTY_ROW] * missing], [*owners, *[0] * missing])

    def _with_rows(
        self, batch: dict[str, Any], rows: Sequence[TrainingRow], owners: Sequence[int]
    ) -> dict[str, Any]:
        """The batch with more rows, each with the advantage of a row that it has."""
        if not rows:
            return batch
        added = self._collate(rows)
        added["advantages"] = batch["advantages"][list(owners)]
        for name, model in (("old_per_token_logps", self.model), ("ref_per_token_logps", self.ref_model)):
            if name in batch:
                added[name] = self._log_probabilities(model, added)
        pads = {"prompt_ids": self._tokenizer.pad_token_id, "completion_ids": self._tokenizer.pad_token_id}
        extended = {
            name: _concatenate(value, added[name], pads.get(name, 0), name in LEFT_PADDED)
            if name in added
            else value
            for name, value in batch.items()
        }
        losses = (extended["completion_mask"] * extended["tool_mask"]).sum()
        extended["num_items_in_batch"] = self.accelerator.gather(losses).sum()
        return extended

    def _collate(self, rows: Sequence[TrainingRow]) -> dict[str, Tensor]:
        pad = self._tokenizer.pad_token_id

        def padded(values: Sequence[Sequence[Any]], fill: int, side: str, dtype: torch.dtype) -> Tensor:
            tensors = [torch.tensor(v, dtype=dtype) for v in values]
            return torch.nn.utils.rnn.pad_sequence(
                tensors, batch_first=True, padding_value=fill, padding_side=side
            ).to(self.accelerator.device)

        prompts, completions = [r.prompt_ids for r in rows], [r.completion_ids for r in rows]
        reported = [[float("nan") if x is None else x for x in r.logprobs] for r in rows]
        return {
            "prompt_ids": padded(prompts, pad, "left", torch.long),
            "prompt_mask": padded([[1] * len(ids) for ids in prompts], 0, "left", torch.long),
            "completion_ids": padded(completions, pad, "right", torch.long),
            "completion_mask": padded([[1] * len(ids) for ids in completions], 0, "right", torch.long),
            "tool_mask": padded([r.mask for r in rows], 0, "right", torch.long),
            "sampling_per_token_logps": padded(reported, 0, "right", torch.float32),
        }

    def _log_probabilities(self, model: Any, rows: dict[str, Tensor]) -> Tensor:
        ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
        mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
        size, length = self.args.per_device_train_batch_size, rows["completion_ids"].shape[1]
        with torch.no_grad():
            logps, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, length, batch_size=size)
        return logps


def _concatenate(rows: Tensor, more: Tensor, fill: int, left: bool) -> Tensor:
    """Rows above more rows, padded to one length."""
    if rows.ndim == 1:
        return torch.cat([rows, more.to(rows.dtype)])
    length = max(rows.shape[1], more.shape[1])

    def padded(part: Tensor) -> Tensor:
        space = length - part.shape[1]
        return torch.nn.functional.pad(part, (space, 0) if left else (0, space), value=fill)

    return torch.cat([padded(rows), padded(more.to(rows.dtype))])
