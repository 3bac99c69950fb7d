"""Traces in files, one text or JSON lines, read and worked on over all cores; what is done with them is the caller's."""

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

T = TypeVar("T")
TEXT_KEYS = ("text", "response", "completion", "output", "trace")
MIN_PARALLEL_RECORDS = 64  # fewer than this are done before a pool has started
BATCH_SIZE = 2048


@dataclass(frozen=True, slots=True)
class TextRecord:
    """One trace: where it comes from, its text and prompt, and the JSON object around it, if there is one."""

    source: str
    text: str
    prompt: str = ""
    fields: Mapping[str, Any] | None = None
    key: str = ""


def read_records(paths: Sequence[str], key: str | None = None) -> Iterator[TextRecord]:
    """The traces of files, `-` for stdin, in order. A `.jsonl` file has one JSON object a line, any other is one text.

    The text of an object is under `key`, or the first of `TEXT_KEYS` that it has; a string under
    `prompt` is its prompt. Raises `AprError` that names the file and line.
    """
    for path in paths:
        if path == "-":
            yield from _read(sys.stdin, "<stdin>", None, key)
            continue
        try:
            with open(path, encoding="utf-8") as file:
                yield from _read(file, path, Path(path).suffix == ".jsonl", key)
        except (OSError, UnicodeDecodeError) as error:
            raise AprError(f"cannot read {path}: {error}") from None


def _read(file: TextIO, name: str, lines: bool | None, key: str | None) -> Iterator[TextRecord]:
    first = file.readline()
    if lines is None:  # stdin has no name to go by
        lines = first.lstrip().startswith("{") and _object(first) is not None
    if not lines:
        yield TextRecord(name, first + file.read())
        return
    for number, line in enumerate(chain([first], file), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        fields = _object(line)
        if fields is None:
            raise AprError(f"{where}: not a JSON object")
        found = key or next((k for k in TEXT_KEYS if isinstance(fields.get(k), str)), None)
        if found is None or not isinstance(fields.get(found), str):
            wanted = key or ", ".join(TEXT_KEYS)
            raise AprError(f"{where}: no text, expected a string under {wanted} (name the key with --key)")
        prompt = fields.get("prompt")
        yield TextRecord(where, fields[found], prompt if isinstance(prompt, str) else "", fields, found)


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def parallel_map(
    work: Callable[[TextRecord], T], found: Iterable[TextRecord], jobs: int | None = None
) -> Iterator[T]:
    """`work` on every record, in order, in `jobs` processes (None: one a core), with its progress on stderr.

    `work` has to be a function of a module, or a partial of one.
    """
    from rich.console import Console
    from rich.progress import Progress

    waiting = iter(found)
    head = list(islice(waiting, MIN_PARALLEL_RECORDS))
    jobs = jobs or len(os.sched_getaffinity(0))
    if len(head) < MIN_PARALLEL_RECORDS or jobs == 1:
        yield from map(work, chain(head, waiting))
        return
    console = Console(stderr=True)
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        Progress(console=console, disable=not console.is_terminal, transient=True) as progress,
    ):
        task = progress.add_task("traces", total=None)
        while head:
            for result in pool.map(work, head, chunksize=16):
                progress.advance(task)
                yield result
            head = list(islice(waiting, BATCH_SIZE))
