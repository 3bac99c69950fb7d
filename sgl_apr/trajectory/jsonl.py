"""JSON Lines files: one reader, and an appender that lets an interrupted run continue."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError


def read_lines(
    path: str | Path, *, allow_partial: bool = False, expected: str = "a JSON object"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number (from 1) and the object of every line of a file. Blank lines are skipped.

    Args:
        path: The file.
        allow_partial: Skip a last line that does not end with a line break: a run that still writes the file, or
            was interrupted, leaves one.
        expected: What a line has to be, for error messages.

    Raises:
        AprError: The file cannot be read, or a line is not a JSON object. The message names the file and the line.
    """
    try:
        with open(path, "rb") as file:  # as bytes, because a partial line can end within a character
            lines = (line for line in file if not allow_partial or line.endswith(b"\n"))
            yield from parse_lines(lines, str(path), expected=expected)
    except OSError as error:
        raise AprError(f"cannot read {path}: {error.strerror}") from None


def parse_lines(
    lines: Iterable[str | bytes], name: str, *, expected: str = "a JSON object"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield what `read_lines` yields, from lines instead of a file.

    Args:
        lines: The lines.
        name: Stands for the file in error messages.
        expected: What a line has to be, for error messages.

    Raises:
        AprError: A line is not a JSON object.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise AprError(f"{name}, line {number}: expected {expected}, found no JSON: {error}") from None
        if not isinstance(data, dict):
            raise AprError(f"{name}, line {number}: expected {expected}, found {type(data).__name__}")
        yield number, data


def count_lines(path: str | Path) -> int:
    """Return the number of complete lines of a file, without parsing them.

    Raises:
        AprError: The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return sum(line.endswith(b"\n") and not line.isspace() for line in file)
    except OSError as error:
        raise AprError(f"cannot read {path}: {error.strerror}") from None


@contextmanager
def open_for_append(path: Path) -> Iterator[int]:
    """Open a file to append lines, and lock it against other processes.

    A partial line at its end, which an interrupted run has left, is removed.

    Args:
        path: The file. It is created if it does not exist.

    Yields:
        The file descriptor, for `append_line`.

    Raises:
        AprError: Another process appends to the file.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AprError(f"another run writes to {path}") from None
        os.ftruncate(file, _complete_bytes(path))
        yield file
    finally:
        os.close(file)


def append_line(file: int, line: str) -> None:
    """Append a line to a file from `open_for_append`, all of it or nothing.

    Raises:
        AprError: The line could not be written, for example to a full disk. What was written of it is removed.
    """
    data, start = line.encode() + b"\n", os.fstat(file).st_size
    try:
        while data:  # a write may be short, and the rest of it may then fail
            data = data[os.write(file, data) :]
    except OSError as error:
        os.ftruncate(file, start)
        raise AprError(f"a line could not be written, and is left out: {error.strerror}") from error


def _complete_bytes(path: Path) -> int:
    """The length of a file in bytes, without a partial line at its end."""
    with open(path, "rb") as file:
        return sum(len(line) for line in file if line.endswith(b"\n"))
