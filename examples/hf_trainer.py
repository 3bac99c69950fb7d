"""Hugging Face's Trainer on trajectories, at any scale. Run `pip install -e '.[trainer]'` in the clone first.

python examples/hf_trainer.py --model DIRECTORY --data trajectories.jsonl --output_dir out [any flag of TrainingArguments]
accelerate launch --config_file configs/8b-fsdp.yaml examples/hf_trainer.py --model Qwen/Qwen3-8B ...    # see that file

Every line of the data is a trajectory. Training trees of the trajectories are packed into rows of --length tokens. A batch
is one row; use --gradient_accumulation_steps for more. --join kv trains for joins in the KV cache, text for joins by text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.collate import Collator, log_probabilities, pack_rows
from sgl_apr.training.training_tree import TrainingTree, build_training_tree
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass
class Arguments:
    """Arguments in addition to TrainingArguments."""

    model: str = field(metadata={"help": "a directory or hub id whose tokenizer has the tags"})
    data: Path = field(metadata={"help": "a file with one Trajectory.to_json per line"})
    length: int = field(default=8192, metadata={"help": "tokens per row"})
    join: Literal["text", "kv"] = field(default="text", metadata={"help": "how branches are joined"})
    attention: Literal["dense", "later"] = field(
        default="later",
        metadata={"help": "later: FlexAttention with linear memory; dense: a full mask, for small rows"},
    )


class TreeTrainer(Trainer):  # type: ignore[misc]  # without the types of transformers
    """A trainer with one loss for every token that the model decoded."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        return -log_probabilities(model, inputs).mean()


def rows(path: Path, eos: int, length: int, join: Literal["text", "kv"]) -> list[list[TrainingTree]]:
    """The training trees of a file, packed into rows."""
    with path.open(encoding="utf-8") as file:
        trees = [
            tree
            for line in file
            for tree in build_training_tree(
                [Trajectory.from_json(line)], eos=eos, join=join, separate_contexts=True
            ).split()
            if len(tree.sources)
        ]
    return list(pack_rows(trees, length))


def main() -> None:
    """Train, and save the model with its tokenizer."""
    parser = HfArgumentParser((Arguments, TrainingArguments), description=__doc__)
    options, training = parser.parse_args_into_dataclasses()
    training.remove_unused_columns, training.per_device_train_batch_size = False, 1
    eos = min(HfTokenizer(options.model).eos_ids)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, attn_implementation="sdpa" if options.attention == "dense" else "flex_attention"
    )
    collate = Collator(pad=eos, attention=options.attention)
    trainer = TreeTrainer(
        model=model,
        args=training,
        train_dataset=rows(options.data, eos, options.length, options.join),
        data_collator=lambda batch: collate(batch),
    )
    trainer.train()
    trainer.save_model()
    AutoTokenizer.from_pretrained(options.model).save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()
