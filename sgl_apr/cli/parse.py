"""`sgl-apr parse`: show the structure of finished traces."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from sgl_apr.cli.arguments import add_trace_arguments
from sgl_apr.cli.display import print_trajectory
from sgl_apr.cli.trace_reader import NO_BLOCK, read_traces
from sgl_apr.formats.lenient_parser import Reading
from sgl_apr.trajectory.trace_files import TextRecord
from sgl_apr.views.printable import printable, printable_json


def add_command(commands: Any) -> None:
    """Add `parse` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "parse",
        help="show the structure of finished traces, and their defects",
        epilog="example: sgl-apr parse trace.txt --dialect threadweaver --json",
    )
    parser.add_argument("file", help="a text, a .jsonl file, or - for stdin")
    add_trace_arguments(parser)
    parser.add_argument("--tokenizer", metavar="DIR_OR_ID", help="count tokens with this tokenizer")
    parser.add_argument("--json", action="store_true", help="print each trajectory as a JSON line")
    parser.set_defaults(command=_parse)


def _parse(options: argparse.Namespace) -> int:
    valid = True
    for record, reading in read_traces(
        [options.file], options.dialect, options.key, options.jobs, options.tokenizer
    ):
        valid = valid and reading.is_valid and bool(record.text.strip())
        if record.text.strip() and reading.is_valid and not reading.trajectory.blocks and not options.dialect:
            print(printable(f"{record.source}: {NO_BLOCK}"), file=sys.stderr)
        if options.json:
            print(printable_json(json.dumps(_reading_json(record, reading), ensure_ascii=False)))
            continue
        print_trajectory(reading.trajectory, record.source, metrics=bool(options.tokenizer))
        if not record.text.strip():
            print(printable(f"{record.source}: the text is empty"), file=sys.stderr)
        for defect in reading.defects:
            print(printable(f"{record.source}: {defect}"), file=sys.stderr)
    return int(not valid)


def _reading_json(record: TextRecord, reading: Reading) -> dict[str, Any]:
    trajectory = reading.trajectory
    counted = all(s.token_ids is not None for s in trajectory.spans)
    return {
        **json.loads(trajectory.to_json()),
        "source": record.source,
        "valid": reading.is_valid,
        "defects": [asdict(d) for d in reading.defects],
        "metrics": asdict(trajectory.metrics()) if counted else None,
    }
