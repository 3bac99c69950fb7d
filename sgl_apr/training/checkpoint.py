"""The directory of a training run: whose it is, its last checkpoint, and the model that comes of it."""

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
    """`start`, the checkpoint that a run begins with, with `out` made or found to be of the same run.

    Raises `AprError` where it belongs to a run with another configuration, or `start` is no checkpoint.
    """
    if not (start / "config.json").is_file():
        raise AprError(f"{start} is no checkpoint: it has no config.json")
    out.mkdir(parents=True, exist_ok=True)
    known, asked = out / CONFIG_FILE, json.dumps(asdict(config), indent=1) + "\n"
    if known.exists() and known.read_text(encoding="utf-8") != asked:
        raise AprError(f"{out} holds a run with another configuration: choose another directory")
    known.write_text(asked, encoding="utf-8")
    return start


@dataclass(frozen=True, slots=True)
class Progress:
    """What of a run is done: steps, tokens, and the place in its examples where it goes on."""

    step: int = 0
    tokens: int = 0
    place: tuple[int, int] = (0, 0)


def save_checkpoint(
    out: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, done: Progress
) -> None:
    """A checkpoint, whole or not at all."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": asdict(done)}
    partial = out / f"{CHECKPOINT_FILE}.partial"
    torch.save(state, partial)
    os.replace(partial, out / CHECKPOINT_FILE)


def load_checkpoint(out: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """What is done, with model and optimizer as they were then; lines of the log behind that are dropped."""
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
    """The model, with the tokenizer of where it began, as a checkpoint that a server loads."""
    model.save_pretrained(target)
    for name in TOKENIZER_FILES:
        if (start / name).exists():
            shutil.copyfile(start / name, target / name)
    return target
