"""A file of lines that a run writes as it goes, whole ones only, and goes on with after whatever ended it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgl_apr.errors import AprError


@contextmanager
def open_for_append(path: Path) -> Iterator[int]:
    """The file, for whole lines at its end and for nobody else meanwhile."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AprError(f"another run writes to {path}") from None
        os.ftruncate(file, _whole(path))
        yield file
    finally:
        os.close(file)


def _whole(path: Path) -> int:
    """The length of a file without half a line at its end."""
    length = 0
    with open(path, "rb") as file:
        for line in file:
            length += len(line) if line.endswith(b"\n") else 0
    return length
