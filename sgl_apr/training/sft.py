"""Supervised fine-tuning: a loop over batches of training trees, which continues where an interrupted run stopped."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sgl_apr.formats.dialects import dialect
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.batches import batch_stream
from sgl_apr.training.checkpoint import (
    LOG_FILE,
    Progress,
    export_model,
    load_checkpoint,
    save_checkpoint,
    start_run,
    write_errors,
)
from sgl_apr.training.config import SftConfig, Steps
from sgl_apr.training.device import device, load_model
from sgl_apr.training.examples import make_examples
from sgl_apr.training.join_distillation import JoinDistillation
from sgl_apr.training.lora import (
    ADAPTER_FILE,
    adapter_tensors,
    add_lora,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from sgl_apr.training.models import locate_model
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.muon import Muon
from sgl_apr.training.objectives import Likelihood, Objective

MODEL_DIR, START_DIR = "model", "begin"


@dataclass(frozen=True, slots=True)
class SftStepLog:
    """One step, and one line of the log.

    Attributes:
        step: Counted from 1.
        tokens: Tokens computed so far.
        losses: Tokens of this step with a loss; of the objective "join" those after a join.
        loss: What the objective minimizes.
        rate: Learning rate.
        norm: Gradient norm before clipping.
        seconds: Seconds that the step took.
    """

    step: int
    tokens: int
    losses: int
    loss: float
    rate: float
    norm: float
    seconds: float


def learning_rate(steps: Steps, step: int, done: float) -> float:
    """The learning rate of a step, counted from 0, when a share `done` of the tokens has been computed."""
    warm = min(1.0, (step + 1) / max(1, steps.warmup))
    return steps.rate * warm * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


def train(config: SftConfig, out: Path, on_step: Callable[[SftStepLog], None] | None = None) -> Path:
    """Train as configured.

    A run that was interrupted continues after its last checkpoint, with the same losses.

    Args:
        config: The configuration.
        out: Directory of the run, for log, checkpoints and model.
        on_step: Called after each step.

    Returns:
        The trained model, as a checkpoint that a server can load.

    Raises:
        AprError: If the directory belongs to a run with another configuration or cannot be written, or the configuration
            cannot be run.
    """
    start = start_run(config, _start(config, out), out)
    torch.manual_seed(config.steps.seed)
    model = load_model(start)
    tokenizer = HfTokenizer(start)
    if config.steps.lora_rank:
        add_lora(model, config.steps.lora_rank, tokenizer.added_tokens.values())
    model.to(device())
    optimizer = Muon(_parameter_groups(model, config.steps))
    done = load_checkpoint(out, model, optimizer)
    step, tokens, place = done.step, done.tokens, done.place
    objective = _objective(config, model, tokenizer, start)
    model.train()
    with write_errors(out / LOG_FILE), (out / LOG_FILE).open("a", buffering=1, encoding="utf-8") as log:
        batches = batch_stream(
            objective.examples, config.steps.batch, config.steps.seed, place, row_tokens=config.steps.row
        )
        while tokens < config.steps.tokens:
            rows, place = next(batches)
            began = time.monotonic()
            rate = learning_rate(config.steps, step, tokens / config.steps.tokens)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(model.device.type, torch.bfloat16, config.steps.precision == "bfloat16"):
                loss, count = objective.loss(model, rows)
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.steps.clip))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += sum(tree.tokens for row in rows for tree in row)
            step += 1
            seconds = time.monotonic() - began
            step_log = SftStepLog(step, tokens, count, loss.item(), rate, norm, seconds)
            log.write(json.dumps(asdict(step_log)) + "\n")
            if on_step:
                on_step(step_log)
            if step % config.steps.checkpoint == 0:
                save_checkpoint(out, model, optimizer, Progress(step, tokens, place))
    save_checkpoint(out, model, optimizer, Progress(step, tokens, place))
    if config.steps.lora_rank:
        adapter, model = adapter_tensors(model), load_model(start)
        with write_errors(out / ADAPTER_FILE):
            save_adapter(out / ADAPTER_FILE, adapter)
        merge_adapter(model, load_adapter(out / ADAPTER_FILE))
    return export_model(out / MODEL_DIR, model, start)


def _objective(config: SftConfig, model: Any, tokenizer: HfTokenizer, start: Path) -> Objective:
    examples, pad = make_examples(config.data, tokenizer), min(tokenizer.eos_ids)
    if config.steps.objective == "join":
        return JoinDistillation(examples, load_model(start).to(device()), pad)
    return Likelihood(examples, model, tokenizer, config.steps)


def _start(config: SftConfig, out: Path) -> Path:
    """The checkpoint that the run starts from, created first if it is to have fresh weights."""
    if config.model.path:
        return Path(locate_model(config.model.path))
    if not (out / START_DIR / "config.json").is_file():
        fresh = {name: value for name, value in asdict(config.model).items() if name != "path"}
        names = config.data.dialects
        if len(names) > 1:
            fresh["dialects"] = names
        # Under another name until it is complete, so that a full disk leaves no half of it that looks like a checkpoint.
        partial = out / f"{START_DIR}.partial"
        with write_errors(out):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                tags = dict.fromkeys(tag for name in names for tag in dialect(name).tags)
                countdown_llama(partial, list(tags), **fresh)
                shutil.rmtree(out / START_DIR, ignore_errors=True)
                partial.rename(out / START_DIR)
            except Exception:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return out / START_DIR


def _parameter_groups(model: Any, steps: Steps) -> list[dict[str, Any]]:
    """Three groups: matrices of layers; embedding and head; norms, which have no weight decay."""
    decay = steps.weight_decay
    embeddings = {
        id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {
            "params": [p for p in parameters if p.dim() == 2 and id(p) not in embeddings],
            "weight_decay": decay,
            "matrices": steps.optimizer == "muon",
        },
        {"params": [p for p in parameters if id(p) in embeddings], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]
