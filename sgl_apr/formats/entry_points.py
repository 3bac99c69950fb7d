"""Entry points of installed packages. Reading them takes milliseconds, so they are read once for each import path."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points


def installed_entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group, from the packages that can be imported now."""
    return _read(group, tuple(sys.path))


@lru_cache(maxsize=32)
def _read(group: str, import_path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))
