"""The model that comes with this package: a small one that decides for itself when to fork, trained on Countdown."""

from __future__ import annotations

from pathlib import Path

from sgl_apr.errors import AprError

NAME = "builtin"
PATH = Path(__file__).parent / "countdown-spawn"


def builtin() -> Path:
    """Its checkpoint; raises `AprError` in versions without one."""
    if not (PATH / "model.safetensors").is_file():
        raise AprError("no trained model comes with this version yet: docs/training.md says how to train one")
    return PATH


def located(model: str) -> str:
    """A model as the command line names it: `builtin`, or whatever SGLang can load."""
    return str(builtin()) if model == NAME else model
