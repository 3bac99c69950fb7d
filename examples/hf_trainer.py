"""Hugging Face's Trainer on trajectories, at any scale: `pip install 'sgl-apr[trainer]'` first.

python examples/hf_trainer.py --model DIRECTORY --data trajectories.jsonl --output_dir out [any flag of TrainingArguments]
accelerate launch --config_file configs/8b-fsdp.yaml examples/hf_trainer.py --model Qwen/Qwen3-8B ...    # see that file

Every line of the data is a trajectory, of which structures are packed into rows of --length tokens. One row is a batch;
--gradient_accumulation_steps makes it more. --join kv trains for joins in the KV cache, text for joins by text.
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
    """What TrainingArguments does not say."""

    model: str = field(metadata={"help": "a directory or hub id; its tokenizer has the tags"})
    data: Path = field(metadata={"help": "a trajectory in every line, as Trajectory.to_json writes it"})
    length: int = field(default=8192, metadata={"help": "tokens of a row"})
    join: Literal["text", "kv"] = field(default="text", metadata={"help": "how branches are joined"})
    attention: Literal["dense", "later"] = field(
        default="later",
        metadata={"help": "later: FlexAttention, memory linear; dense: a matrix, for small rows"},
    )


class StructuredTrainer(Trainer):
    """One loss for every token that a model decoded."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        return -log_probabilities(model, inputs).mean()


def rows(path: Path, eos: int, length: int, join: Literal["text", "kv"]) -> list[list[TrainingTree]]:
    """The structures of a file, packed."""
    with path.open(encoding="utf-8") as file:
        made = [
            one
            for line in file
            for one in build_training_tree(
                [Trajectory.from_json(line)], eos=eos, join=join, separate_contexts=True
            ).split()
            if len(one.sources)
        ]
    return list(pack_rows(made, length))


def main() -> None:
    """Train, and save the model with its tokenizer."""
    parser = HfArgumentParser((Arguments, TrainingArguments), description=__doc__)  # type: ignore[arg-type]
    options, training = parser.parse_args_into_dataclasses()
    training.remove_unused_columns, training.per_device_train_batch_size = False, 1
    eos = min(HfTokenizer(options.model).eos_ids)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, attn_implementation="sdpa" if options.attention == "dense" else "flex_attention"
    )
    collate = Collator(pad=eos, attention=options.attention)
    trainer = StructuredTrainer(
        model=model,
        args=training,
        train_dataset=rows(options.data, eos, options.length, options.join),  # type: ignore[arg-type]
        data_collator=lambda batch: collate(batch),
    )
    trainer.train()
    trainer.save_model()
    AutoTokenizer.from_pretrained(options.model).save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()
