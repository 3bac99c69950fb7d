"""`sgl-apr validate`: count the defects of finished traces."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any

from sgl_apr.cli.arguments import add_trace_arguments
from sgl_apr.cli.trace_reader import NO_BLOCK, read_traces


def add_command(commands: Any) -> None:
    """Add `validate` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "validate",
        help="count the defects of finished traces; status 1 if there are any, or no trace",
        description="Count the defects of finished traces. The status is 1 if there are any, or no trace. Without --dialect "
        "a text without a block is a defect, because nothing shows that it is a trace; with --dialect it is a reply that "
        "did not fork. An empty text is always a defect.",
        epilog="example: sgl-apr validate replies.jsonl more.jsonl --dialect npr",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="texts, .jsonl files, or - for stdin")
    add_trace_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.set_defaults(command=_validate)


def _validate(options: argparse.Namespace) -> int:
    traces, valid, defects = Counter[str](), Counter[str](), Counter[str]()
    for record, reading in read_traces(options.files, options.dialect, options.key, options.jobs):
        found = [d.name for d in reading.defects]
        if not record.text.strip():
            found.append("empty text")
        elif not found and not reading.trajectory.blocks and not options.dialect:
            found.append("no block")
        traces[reading.trajectory.dialect] += 1
        valid[reading.trajectory.dialect] += not found
        defects.update(found)
    if options.json:
        counts = {
            "traces": traces.total(),
            "valid": valid.total(),
            "dialects": dict(traces),
            "defects": dict(defects.most_common()),
        }
        print(json.dumps(counts))
    else:
        _print_counts(traces, valid, defects)
    if count := defects["no block"]:
        print(f"{NO_BLOCK}: {count} of {traces.total()} texts", file=sys.stderr)
    return int(valid.total() < traces.total())


def _print_counts(traces: Counter[str], valid: Counter[str], defects: Counter[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("dialect", "traces", "valid")
    for name, count in sorted(traces.items()):
        table.add_row(name, str(count), str(valid[name]))
    console.print(table)
    if defects:
        table = Table("defect", "times")
        for name, count in defects.most_common():
            table.add_row(name, str(count))
        console.print(table)
