"""The model that comes with this package: a small one that decides for itself when to fork, trained on Countdown."""

from __future__ import annotations

from pathlib import Path

NAME = "builtin"


def builtin_path() -> Path:
    """Its checkpoint."""
    return Path(__file__).parent / "countdown-spawn"


def locate_model(model: str) -> str:
    """A model as the command line names it: `builtin`, or whatever SGLang can load."""
    return str(builtin_path()) if model == NAME else model
