"""Tokens per second of a training step: training trees against a plain loop over separate sequences.

python -m benchmarks.training.step_speed [--trajectories 96] [--rounds 3] [--json] [--check]

The same Countdown demonstrations (ThreadWeaver, joined as text), the same fresh model of 0.9M parameters, the same optimizer. A
plain loop pads one causal sequence for each part of a trajectory that was decoded in one context, computes all logits, and lets
`labels` select the losses. A training tree has every shared prefix once, and logits only where there is a loss; its attention is a
dense mask, or visits the visible blocks alone. The three take turns. Tokens with a loss are the same in all, so their number per
second compares the loops.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.expert import SearchStyle
from sgl_apr.evaluation.tasks.countdown.problems import generate_problems
from sgl_apr.formats.dialects import dialect
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.batches import batch_by_length
from sgl_apr.training.block_attention import BLOCK_ATTENTION
from sgl_apr.training.collate import Collator, log_probabilities
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.training_rows import TrainingRow, build_training_rows
from sgl_apr.training.training_tree import TrainingTree, build_training_tree
from sgl_apr.trajectory.trajectory import Trajectory

NAME = "threadweaver"
STYLE = SearchStyle(window=2048, forks={3: 0.1, 4: 1.0}, width=(2, 8), revisit_rate=0.9)
BATCH = 6_144  # tokens, padding included
MIN_SPEEDUP = 1.5


def demonstrations(tokenizer: HfTokenizer, count: int) -> list[Trajectory]:
    """Trajectories of problems of three and four numbers."""
    problems = generate_problems(count, "train", numbers=(3, 4, 4))

    async def make() -> list[Trajectory]:
        return [await demonstration(p, tokenizer, seed=0, style=STYLE, target_dialect=NAME) for p in problems]

    return asyncio.run(make())


def row_batches(rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
    """Rows of similar length together, at most `BATCH` tokens with padding."""
    batches: list[list[TrainingRow]] = []
    for row in sorted(rows, key=lambda r: len(r.prompt_ids) + len(r.completion_ids)):
        length = len(row.prompt_ids) + len(row.completion_ids)
        if not batches or length * (len(batches[-1]) + 1) > BATCH:
            batches.append([])
        batches[-1].append(row)
    return batches


def plain_loss(model: Any, rows: Sequence[TrainingRow], pad: int) -> torch.Tensor:
    """The sum of the losses of causal sequences, as a Hugging Face model computes them from labels."""
    length = max(len(r.prompt_ids) + len(r.completion_ids) for r in rows)
    ids = torch.full((len(rows), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for k, row in enumerate(rows):
        tokens, begin = (*row.prompt_ids, *row.completion_ids), len(row.prompt_ids)
        ids[k, : len(tokens)] = torch.tensor(tokens)
        mask[k, : len(tokens)] = 1
        chosen = [t if m else -100 for t, m in zip(row.completion_ids, row.mask, strict=True)]
        labels[k, begin : len(tokens)] = torch.tensor(chosen)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    return out.loss * (labels[:, 1:] != -100).sum()


def tree_loss(model: Any, trees: Sequence[TrainingTree], collate: Collator) -> torch.Tensor:
    """The sum of the losses of training trees."""
    return -log_probabilities(model, collate(trees)).sum()


def epoch(model: Any, batches: Sequence[Any], loss: Callable[[Any, Any], torch.Tensor]) -> float:
    """Seconds of one step on every batch, with AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    began = time.perf_counter()
    for batch in batches:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def measure(count: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each loop."""
    with tempfile.TemporaryDirectory() as directory:
        path = countdown_llama(Path(directory), dialect(NAME).tags, layers=4)
        tokenizer = HfTokenizer(path)
        pad = min(tokenizer.eos_ids)
        made = demonstrations(tokenizer, count)
        rows = [row for t in made for row in build_training_rows(t, eos=pad)]
        trees = [build_training_tree([t], eos=pad) for t in made]
        losses = sum(len(tree.targets) for tree in trees)
        models = {
            name: AutoModelForCausalLM.from_pretrained(path, attn_implementation=name)
            for name in ("sdpa", BLOCK_ATTENTION)
        }
    tree_batches = batch_by_length(trees, BATCH, random.Random(0))
    dense, blocks = Collator(pad), Collator(pad, "later")
    row_tokens = sum(len(r.prompt_ids) + len(r.completion_ids) for r in rows)
    tree_tokens = sum(tree.tokens for tree in trees)
    loops: dict[str, tuple[int, Callable[[], float]]] = {
        "plain loop": (
            row_tokens,
            lambda: epoch(models["sdpa"], row_batches(rows), lambda m, b: plain_loss(m, b, pad)),
        ),
        "trees, dense mask": (
            tree_tokens,
            lambda: epoch(models["sdpa"], tree_batches, lambda m, b: tree_loss(m, b, dense)),
        ),
        "trees, visible blocks": (
            tree_tokens,
            lambda: epoch(models[BLOCK_ATTENTION], tree_batches, lambda m, b: tree_loss(m, b, blocks)),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, (_tokens, run) in loops.items():
            seconds[name].append(run())
    plain = median(seconds["plain loop"])
    return [
        {
            "loop": name,
            "tokens": tokens,
            "losses": losses,
            "seconds": median(seconds[name]),
            "tokens_per_s": tokens / median(seconds[name]),
            "losses_per_s": losses / median(seconds[name]),
            "speedup": plain / median(seconds[name]),
        }
        for name, (tokens, _run) in loops.items()
    ]


def show(result: dict[str, Any]) -> None:
    """Print a table for people."""
    table = Table("loop", "computed tokens", "tokens/s", "tokens with a loss/s", "speed")
    for row in result["rows"]:
        table.add_row(
            row["loop"], f"{row['tokens']:,}", f"{row['tokens_per_s']:,.0f}", f"{row['losses_per_s']:,.0f}",
            f"{row['speedup']:.2f}x",
        )  # fmt: skip
    Console().print(table)


def main() -> int:
    """Measure the three loops."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trajectories", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = measure(options.trajectories, options.rounds)
    speedup = rows[-1]["speedup"]
    missed = [f"the loop over trees is {speedup:.2f} times as fast, expected {MIN_SPEEDUP}"]
    result = {"hardware": hardware(), "rows": rows}
    return finish(result, missed if speedup < MIN_SPEEDUP else [], show, options)


if __name__ == "__main__":
    sys.exit(main())
