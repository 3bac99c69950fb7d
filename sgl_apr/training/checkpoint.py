"""The directory of a training run: its configuration, its last checkpoint, its log, and the model that it exports."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sgl_apr.errors import AprError

LOG_FILE, CHECKPOINT_FILE, CONFIG_FILE = "log.jsonl", "checkpoint.pt", "run.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def start_run(config: Any, start: Path, out: Path) -> Path:
    """Create the directory of a run, or find it with the same configuration.

    Args:
        config: The configuration, a dataclass.
        start: The checkpoint that the run starts from.
        out: The directory.

    Returns:
        `start`.

    Raises:
        AprError: If the directory belongs to a run with another configuration, or `start` is not a checkpoint.
    """
    if not (start / "config.json").is_file():
        raise AprError(f"{start} is not a checkpoint: it has no config.json")
    out.mkdir(parents=True, exist_ok=True)
    config_file, config_json = out / CONFIG_FILE, json.dumps(asdict(config), indent=1) + "\n"
    if config_file.exists() and config_file.read_text(encoding="utf-8") != config_json:
        raise AprError(f"{out} holds a run with another configuration: choose another directory")
    config_file.write_text(config_json, encoding="utf-8")
    return start


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Steps done.
        tokens: Tokens computed.
        place: The position of the next batch, see `sgl_apr.training.batches`.
    """

    step: int = 0
    tokens: int = 0
    place: tuple[int, int] = (0, 0)


def save_checkpoint(
    out: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, done: Progress
) -> None:
    """Save a checkpoint atomically."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": asdict(done)}
    partial = out / f"{CHECKPOINT_FILE}.partial"
    torch.save(state, partial)
    os.replace(partial, out / CHECKPOINT_FILE)


def load_checkpoint(out: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Load the last checkpoint of a run into a model and an optimizer.

    Log lines of later steps are removed.

    Returns:
        The progress at that checkpoint; none if there is no checkpoint yet.
    """
    if not (out / CHECKPOINT_FILE).exists():
        (out / LOG_FILE).unlink(missing_ok=True)
        return Progress()
    state = torch.load(out / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    done = Progress(**state["done"])
    lines = (out / LOG_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    (out / LOG_FILE).write_text("".join(lines[: done.step]), encoding="utf-8")
    return done


def export_model(target: Path, model: Any, start: Path) -> Path:
    """Save the model as a checkpoint that a server can load, with the tokenizer of the checkpoint that the run started from."""
    model.save_pretrained(target)
    for name in TOKENIZER_FILES:
        if (start / name).exists():
            shutil.copyfile(start / name, target / name)
    return target
