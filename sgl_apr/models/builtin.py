"""The model that comes with this package: a small one that decides for itself when to fork, trained on Countdown."""

from __future__ import annotations

from pathlib import Path

from sgl_apr.errors import AprError

NAME = "builtin"


def builtin() -> Path:
    """Its checkpoint; docs/countdown.md says how it was trained and what it can do. Raises `AprError` if it is missing."""
    path = Path(__file__).parent / "countdown-spawn"
    if not (path / "model.safetensors").is_file():
        raise AprError(f"{path} is missing; install the package again")
    return path


def located(model: str) -> str:
    """A model as the command line names it: `builtin`, or whatever SGLang can load."""
    return str(builtin()) if model == NAME else model
