"""The model that ships with this package: small, trained on Countdown, and it decides for itself when to fork."""

from __future__ import annotations

from pathlib import Path

NAME = "builtin"


def builtin_path() -> Path:
    """The directory of its checkpoint."""
    return Path(__file__).parent / "countdown-spawn"


def locate_model(model: str) -> str:
    """Resolve a model as the command line names it: `builtin`, or anything that SGLang can load."""
    return str(builtin_path()) if model == NAME else model
