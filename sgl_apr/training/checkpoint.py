"""The directory of a training run: its configuration, its last checkpoint, its log, and the model that it exports."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from sgl_apr.errors import AprError
from sgl_apr.trajectory.jsonl import file_error

LOG_FILE, CHECKPOINT_FILE, CONFIG_FILE = "log.jsonl", "checkpoint.pt", "run.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# What the operating system says about a place where nothing can be written.
WRITE_ERRNOS = {getattr(errno, name) for name in ("EACCES", "EDQUOT", "EEXIST", "EFBIG", "EIO", "ENAMETOOLONG", "ENOSPC", "ENOTDIR", "EPERM", "EROFS")}  # fmt: skip

TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")
RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise an `AprError` if the block cannot write to `path`, for example to a full disk or a read-only folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRNOS:
            raise
        raise file_error("cannot write to", error.filename or path, error) from None
    except (
        Exception
    ) as error:  # torch, tokenizers and safetensors report a failed write by exceptions of their own
        code = RUST_OS_ERROR.search(str(error))
        if not code and not any(text in str(error) for text in TORCH_WRITE_ERRORS):
            raise
        reason = (
            OSError(int(code[1]), os.strerror(int(code[1])))
            if code
            else ValueError("the checkpoint could not be saved")
        )
        raise file_error("cannot write to", path, reason) from None


def replace_file(path: Path, text: str) -> None:
    """Write a text file completely, or leave it as it is and raise `OSError`."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def start_run(config: Any, start: Path, out: Path) -> Path:
    """Create the directory of a run, or find it with the same configuration.

    Args:
        config: The configuration, a dataclass.
        start: The checkpoint that the run starts from.
        out: The directory.

    Returns:
        `start`.

    Raises:
        AprError: If the directory belongs to a run with another configuration or cannot be written, or `start` is not a
            checkpoint.
    """
    if not (start / "config.json").is_file():
        raise AprError(f"{start} is not a checkpoint: it has no config.json")
    config_file, config_json = out / CONFIG_FILE, json.dumps(asdict(config), indent=1) + "\n"
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if config_file.exists() and not _is_same(config_file.read_text(encoding="utf-8"), config):
            raise AprError(f"{out} holds a run with another configuration: choose another directory")
        replace_file(config_file, config_json)
    return start


def _is_same(written: str, config: Any) -> bool:
    """Whether a file has the configuration. Entries that it lacks are newer than the run, and have to be the default."""
    try:
        return _matches(json.loads(written), config)
    except json.JSONDecodeError:
        return False


def _matches(written: Any, config: Any) -> bool:
    known = {f.name: f for f in fields(config)}
    if not isinstance(written, dict) or not set(written) <= set(known):
        return False
    for name, f in known.items():
        value = getattr(config, name)
        if is_dataclass(value):
            same = _matches(written.get(name, {}), value)
        elif name in written:
            same = written[name] == json.loads(json.dumps(value))
        else:
            same = value == (f.default_factory() if callable(f.default_factory) else f.default)
        if not same:
            return False
    return True


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
    """Save a checkpoint completely, or keep the one before and raise `AprError`."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": asdict(done)}
    partial = out / f"{CHECKPOINT_FILE}.partial"
    try:
        with write_errors(partial):
            torch.save(state, partial)
            os.replace(partial, out / CHECKPOINT_FILE)
    except AprError:
        partial.unlink(missing_ok=True)
        raise


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
    with write_errors(out / LOG_FILE):
        replace_file(out / LOG_FILE, "".join(lines[: done.step]))
    return done


def export_model(target: Path, model: Any, start: Path) -> Path:
    """Save the model as a checkpoint that a server can load, with the tokenizer of the checkpoint that the run started from."""
    with write_errors(target):
        model.save_pretrained(target)
        for name in TOKENIZER_FILES:
            if (start / name).exists():
                shutil.copyfile(start / name, target / name)
    return target
