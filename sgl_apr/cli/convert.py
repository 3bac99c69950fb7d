"""`sgl-apr convert`: write finished traces in another dialect."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from sgl_apr.cli.arguments import add_trace_arguments, load_dialect
from sgl_apr.cli.display import print_error
from sgl_apr.cli.reading_progress import show_reading_progress
from sgl_apr.cli.trace_reader import NO_BLOCK
from sgl_apr.errors import ConversionError
from sgl_apr.formats.conversion import convert
from sgl_apr.formats.dialects import Dialect
from sgl_apr.formats.lenient_parser import detect, read
from sgl_apr.trajectory.trace_files import TextRecord, parallel_map, read_records
from sgl_apr.views.printable import printable, printable_json


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """A record with its text in the new dialect, or with the reason why there is none."""

    record: TextRecord
    text: str
    error: str = ""


def add_command(commands: Any) -> None:
    """Add `convert` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "convert",
        help="write finished traces in another dialect",
        description="Write finished traces in another dialect. The status is 1 if one cannot be written. Without --dialect a "
        "text without a tag of a known dialect is an error; with --dialect it is a reply that did not fork.",
        epilog="example: sgl-apr convert replies.jsonl --to multiverse > converted.jsonl",
    )
    parser.add_argument("file", help="a text, a .jsonl file, or - for stdin")
    add_trace_arguments(parser)
    parser.add_argument(
        "--to", required=True, metavar="NAME_OR_FILE", help="dialect to write them in, or a .lark file"
    )
    parser.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> int:
    target = load_dialect(options.to)  # raises for a wrong name before any file is read
    source = load_dialect(options.dialect) if options.dialect else None
    work = partial(_convert_record, source=source, target=target)
    failed = 0
    for result in parallel_map(work, read_records([options.file], options.key), options.jobs):
        record = result.record
        if result.error:
            failed += 1
            print_error(f"{record.source}: {result.error}")
        elif record.fields is None:
            sys.stdout.write(printable(result.text) if sys.stdout.isatty() else result.text)
        else:
            line = json.dumps({**record.fields, record.key: result.text}, ensure_ascii=False)
            print(printable_json(line))
    return int(failed > 0)


def _convert_record(record: TextRecord, source: Dialect | None, target: Dialect) -> ConversionResult:
    with show_reading_progress(record.source, len(record.text)):
        reading = read(record.text, source)
    if not record.text.strip():
        return ConversionResult(record, "", "the text is empty")
    if source is None and not reading.trajectory.blocks and detect(record.text) is None:
        return ConversionResult(record, "", NO_BLOCK)
    if not reading.is_valid:
        return ConversionResult(record, "", f"{reading.trajectory.dialect}: {reading.defects[0]}")
    try:
        return ConversionResult(record, convert(reading.trajectory, target).text)
    except ConversionError as error:
        return ConversionResult(record, "", str(error))
