"""Reads the traces of `parse` and `validate` in parallel processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from sgl_apr.cli.arguments import load_dialect
from sgl_apr.cli.reading_progress import show_reading_progress
from sgl_apr.formats.dialects import Dialect
from sgl_apr.formats.lenient_parser import Reading, read
from sgl_apr.tokenizer import Tokenizer, load_tokenizer
from sgl_apr.trajectory.trace_files import TextRecord, parallel_map, read_records

NO_BLOCK = "no block of a known dialect, use --dialect"


def read_traces(
    files: Sequence[str],
    dialect_name: str | None,
    key: str | None,
    jobs: int | None,
    tokenizer: str | None = None,
) -> Iterator[tuple[TextRecord, Reading]]:
    """Read the traces of some files.

    Args:
        files: Texts, .jsonl files, or "-" for stdin.
        dialect_name: Dialect of the traces, or its .lark file; None recognizes it by the tags.
        key: Key of the text in an object of a .jsonl file.
        jobs: Number of processes; None is one per core.
        tokenizer: Directory or hub id of a tokenizer, to count tokens.

    Raises:
        AprError: If there is no such dialect, or a file is not usable.
    """
    dialect = load_dialect(dialect_name) if dialect_name else None  # raises before any file is read
    work = partial(_read_record, dialect=dialect, tokenizer=tokenizer)
    return parallel_map(work, read_records(files, key), jobs)


def _read_record(
    record: TextRecord, dialect: Dialect | None, tokenizer: str | None
) -> tuple[TextRecord, Reading]:
    loaded: Tokenizer | None = load_tokenizer(tokenizer) if tokenizer else None
    with show_reading_progress(record.source, len(record.text)):
        return record, read(record.text, dialect, prompt=record.prompt, tokenizer=loaded)
