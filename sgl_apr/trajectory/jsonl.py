"""JSON Lines files: one reader, and an appender that lets an interrupted run continue."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError

BLOCK_BYTES = 1 << 16  # read at a time, to find the last line break of a file


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
    except (OSError, ValueError) as error:
        raise file_error("cannot read", path, error) from None


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
    except (OSError, ValueError) as error:
        raise file_error("cannot read", path, error) from None


def file_error(action: str, path: object, error: OSError | ValueError) -> AprError:
    """Return the error of a file that cannot be used, for example a folder, a path with a NUL, or a full disk.

    Args:
        action: What cannot be done: "cannot read", "cannot write to".
        path: The file.
        error: What the operating system or Python says.
    """
    return AprError(f"{action} {path}: {getattr(error, 'strerror', None) or error}")


@contextmanager
def open_for_append(path: Path) -> Iterator[int]:
    """Open a file to append lines, and lock it against other processes.

    A partial line at its end, which an interrupted run has left, is removed. When the block ends without an error, all
    lines are on the disk.

    Args:
        path: The file. It is created if it does not exist.

    Yields:
        The file descriptor, for `append_line`.

    Raises:
        AprError: Another process appends to the file, or it cannot be written.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except (OSError, ValueError) as error:
        raise file_error("cannot write to", path, error) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AprError(f"another run writes to {path}") from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise AprError(f"cannot write to {path}: expected a file that can be read again")
        try:
            os.ftruncate(file, _complete_bytes(file))
        except OSError as error:
            raise file_error("cannot write to", path, error) from None
        yield file
        try:
            os.fsync(file)
        except OSError as error:
            raise file_error("cannot write to", path, error) from None
    finally:
        os.close(file)


def append_line(file: int, line: str) -> None:
    """Append a line to a file from `open_for_append`, all of it or nothing.

    Raises:
        AprError: The line could not be written, for example to a full disk. What was written of it is removed.
    """
    try:
        data, start = line.encode() + b"\n", os.fstat(file).st_size
    except UnicodeEncodeError as error:
        raise AprError(f"a line could not be written, and is left out: {error}") from None
    try:
        while data:  # a write may be short, and the rest of it may then fail
            data = data[os.write(file, data) :]
    except BaseException as error:  # Ctrl-C too
        with suppress(OSError):
            os.ftruncate(file, start)
        if not isinstance(error, OSError):
            raise
        raise AprError(f"a line could not be written, and is left out: {error.strerror}") from error


def _complete_bytes(file: int) -> int:
    """The length of a file in bytes, without a partial line at its end."""
    end = os.fstat(file).st_size
    while end:
        start = max(0, end - BLOCK_BYTES)
        line_break = os.pread(file, end - start, start).rfind(b"\n")
        if line_break >= 0:
            return start + line_break + 1
        end = start
    return 0
