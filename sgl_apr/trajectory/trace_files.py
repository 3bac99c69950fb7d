"""Reads traces from text files and JSON Lines files, and processes them on all cores."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO, TypeVar

from sgl_apr.errors import AprError
from sgl_apr.trajectory.jsonl import parse_lines, read_lines

T = TypeVar("T")
TEXT_KEYS = ("text", "response", "completion", "output", "trace")
MIN_PARALLEL_RECORDS = 64  # fewer take less time than the start of a process pool
BATCH_SIZE = 2048  # records in memory at a time


@dataclass(frozen=True, slots=True)
class TextRecord:
    """One trace.

    Attributes:
        source: Where it comes from: a file, or a file and a line (`replies.jsonl:3`).
        text: Its text.
        prompt: Its prompt; empty if it has none.
        fields: The JSON object that holds it, if there is one.
        key: The key of the text in that object.
    """

    source: str
    text: str
    prompt: str = ""
    fields: Mapping[str, Any] | None = None
    key: str = ""


def read_records(paths: Sequence[str], key: str | None = None) -> Iterator[TextRecord]:
    """Yield the traces of files, in order.

    A `.jsonl` file has one JSON object in each line. Any other file is one text. The prompt of an object is the
    string under `prompt`, if there is one.

    Args:
        paths: The files; `-` is stdin, which can be either.
        key: The key of the text in an object. By default the first of `TEXT_KEYS` that it has.

    Raises:
        AprError: A file cannot be read, has no object, or a line has no text. The message names the file and the line.
    """
    for path in paths:
        if path == "-":
            yield from _read_stdin(sys.stdin, key)
        elif Path(path).suffix == ".jsonl":
            records = _from_objects(read_lines(path), path, key)
            if (first := next(records, None)) is None:
                raise AprError(f"{path} has no line, expected a JSON object in each line")
            yield first
            yield from records
        else:
            try:
                with open(path, encoding="utf-8") as file:
                    text = file.read()
            except (OSError, ValueError) as error:
                raise AprError(f"cannot read {path}: {error}") from None
            yield TextRecord(path, text)


def _read_stdin(file: TextIO, key: str | None) -> Iterator[TextRecord]:
    name = "<stdin>"
    try:
        first_line = file.readline()
        rest = None if first_line.lstrip().startswith("{") and _is_json(first_line) else file.read()
    except (OSError, ValueError) as error:
        raise AprError(f"cannot read {name}: {error}") from None
    if rest is not None:
        yield TextRecord(name, first_line + rest)
    else:
        yield from _from_objects(parse_lines(_checked(chain([first_line], file), name), name), name, key)


def _checked(lines: Iterable[str], name: str) -> Iterator[str]:
    """The lines of stdin; raises `AprError` for bytes that are no text."""
    try:
        yield from lines
    except (OSError, ValueError) as error:
        raise AprError(f"cannot read {name}: {error}") from None


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _from_objects(
    lines: Iterable[tuple[int, dict[str, Any]]], name: str, key: str | None
) -> Iterator[TextRecord]:
    for number, fields in lines:
        text_key = key or next((k for k in TEXT_KEYS if isinstance(fields.get(k), str)), None)
        if text_key is None or not isinstance(fields.get(text_key), str):
            expected = key or ", ".join(TEXT_KEYS)
            where = f"{name}, line {number}"
            if key is None and (hint := _trajectory_hint(fields)):
                raise AprError(f"{where}: expected the text of a reply, found {hint}")
            raise AprError(f"{where}: no text, expected a string under {expected} (name the key with --key)")
        prompt = fields.get("prompt")
        yield TextRecord(
            f"{name}:{number}", fields[text_key], prompt if isinstance(prompt, str) else "", fields, text_key
        )


def _trajectory_hint(fields: Mapping[str, Any]) -> str:
    """What an object holds in place of a text if this package wrote it, and what reads that; else empty."""
    if "trajectory" in fields:
        return "a trajectory, which `sgl-apr report` shows"
    if "spans" in fields:
        return "a trajectory, which `apr.Trajectory.from_json` reads"
    if {"task", "model", "split"} <= set(fields):
        return "the settings of an evaluation, whose trajectories `sgl-apr report` shows"
    return ""


def parallel_map(
    work: Callable[[TextRecord], T], records: Iterable[TextRecord], jobs: int | None = None
) -> Iterator[T]:
    """Yield the result of a function for every record, in order, with a progress bar on stderr.

    Args:
        work: The function. Other processes import it, so it has to be a function of a module, or a partial of one.
        records: The records.
        jobs: The number of processes. By default one for each core.
    """
    from rich.console import Console
    from rich.progress import Progress

    remaining = iter(records)
    batch = list(islice(remaining, MIN_PARALLEL_RECORDS))
    jobs = jobs or len(os.sched_getaffinity(0))
    if len(batch) < MIN_PARALLEL_RECORDS or jobs == 1:
        yield from map(work, chain(batch, remaining))
        return
    console = Console(stderr=True)
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        Progress(console=console, disable=not console.is_terminal, transient=True) as progress,
    ):
        task = progress.add_task("traces", total=None)
        while batch:
            for result in pool.map(work, batch, chunksize=16):
                progress.advance(task)
                yield result
            batch = list(islice(remaining, BATCH_SIZE))
