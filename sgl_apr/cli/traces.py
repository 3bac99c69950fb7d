"""`sgl-apr parse`, `validate` and `convert`: what they do with each trace, and how it is shown."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from sgl_apr.errors import ConversionError
from sgl_apr.formats.conversion import convert
from sgl_apr.formats.dialects import dialect
from sgl_apr.formats.lenient_parser import Reading, read
from sgl_apr.tokenizer import Tokenizer, load_tokenizer
from sgl_apr.trajectory.trace_files import TextRecord, parallel_map, read_records
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Converted:
    """A record in its new dialect, or why it is not."""

    record: TextRecord
    text: str
    error: str = ""


def add_commands(commands: Any) -> None:
    """Add the three commands to an argparse parser."""
    parse = _command(
        commands,
        "parse",
        "show the structure of finished traces, and what is wrong with them",
        "sgl-apr parse trace.txt --dialect threadweaver --json",
    )
    parse.add_argument("file", help="a text, a .jsonl file, or - for stdin")
    parse.add_argument("--tokenizer", metavar="DIR_OR_ID", help="count tokens with this tokenizer")
    parse.add_argument("--json", action="store_true", help="print each trajectory as a JSON line")
    parse.set_defaults(command=_parse)

    validate = _command(
        commands,
        "validate",
        "count the defects of finished traces; status 1 if there are any",
        "sgl-apr validate replies.jsonl more.jsonl --dialect npr",
    )
    validate.add_argument("files", nargs="+", metavar="FILE", help="texts, .jsonl files, or - for stdin")
    validate.add_argument("--json", action="store_true", help="print the counts as JSON")
    validate.set_defaults(command=_validate)

    change = _command(
        commands,
        "convert",
        "write finished traces in another dialect",
        "sgl-apr convert replies.jsonl --to multiverse > converted.jsonl",
    )
    change.add_argument("file", help="a text, a .jsonl file, or - for stdin")
    change.add_argument("--to", required=True, metavar="DIALECT")
    change.set_defaults(command=_convert)


def _command(commands: Any, name: str, help_: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help_, epilog=f"example: {example}")
    parser.add_argument("--dialect", help="what they are written in (default: recognised by the tags)")
    parser.add_argument("--key", help="where an object of a .jsonl file has its text")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core)")
    return parser


def _read(
    record: TextRecord, dialect: str | None, tokenizer: str | None = None
) -> tuple[TextRecord, Reading]:
    loaded: Tokenizer | None = load_tokenizer(tokenizer) if tokenizer else None
    return record, read(record.text, dialect, prompt=record.prompt, tokenizer=loaded)


def _readings(
    options: argparse.Namespace, files: list[str], tokenizer: str | None = None
) -> Iterator[tuple[TextRecord, Reading]]:
    if options.dialect:
        dialect(options.dialect)  # a wrong name is wrong before any file is
    work = partial(_read, dialect=options.dialect, tokenizer=tokenizer)
    return parallel_map(work, read_records(files, options.key), options.jobs)


def _parse(options: argparse.Namespace) -> int:
    clean = True
    for record, reading in _readings(options, [options.file], options.tokenizer):
        clean = clean and reading.is_valid
        if options.json:
            print(json.dumps(_described(record, reading), ensure_ascii=False))
        else:
            show(reading.trajectory, record.source, figures=bool(options.tokenizer))
        if not options.json:
            for defect in reading.defects:
                print(f"{record.source}: {defect}", file=sys.stderr)
    return int(not clean)


def _described(record: TextRecord, reading: Reading) -> dict[str, Any]:
    trajectory = reading.trajectory
    counted = all(s.token_ids is not None for s in trajectory.spans)
    return {
        **json.loads(trajectory.to_json()),
        "source": record.source,
        "valid": reading.is_valid,
        "defects": [asdict(d) for d in reading.defects],
        "metrics": asdict(trajectory.metrics()) if counted else None,
    }


def show(trajectory: Trajectory, title: str, figures: bool = True) -> None:
    """Print the tree, and the table of figures if the tokens are known."""
    from rich.console import Console

    from sgl_apr.views.tree import render_report, render_tree

    Console().print(render_report(trajectory, title) if figures else render_tree(trajectory, title))


def _validate(options: argparse.Namespace) -> int:
    dialects: Counter[str] = Counter()
    valid: Counter[str] = Counter()
    defects: Counter[str] = Counter()
    for _, reading in _readings(options, options.files):
        dialects[reading.trajectory.dialect] += 1
        valid[reading.trajectory.dialect] += reading.is_valid
        defects.update(d.name for d in reading.defects)
    total, good = dialects.total(), valid.total()
    if options.json:
        print(
            json.dumps(
                {
                    "traces": total,
                    "valid": good,
                    "dialects": dict(dialects),
                    "defects": dict(defects.most_common()),
                }
            )
        )
    else:
        _print_counts(dialects, valid, defects)
    return int(good < total)


def _print_counts(dialects: Counter[str], valid: Counter[str], defects: Counter[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("dialect", "traces", "valid")
    for name, count in sorted(dialects.items()):
        table.add_row(name, str(count), str(valid[name]))
    console.print(table)
    if defects:
        table = Table("defect", "times")
        for name, count in defects.most_common():
            table.add_row(name, str(count))
        console.print(table)


def _convert(options: argparse.Namespace) -> int:
    dialect(options.to)
    work = partial(_converted, dialect=options.dialect, to=options.to)
    failed = 0
    for done in parallel_map(work, read_records([options.file], options.key), options.jobs):
        if done.error:
            failed += 1
            print(f"sgl-apr: error: {done.record.source}: {done.error}", file=sys.stderr)
        elif done.record.fields is None:
            sys.stdout.write(done.text)
        else:
            print(json.dumps({**done.record.fields, done.record.key: done.text}, ensure_ascii=False))
    return int(failed > 0)


def _converted(record: TextRecord, dialect: str | None, to: str) -> Converted:
    reading = read(record.text, dialect)
    if not reading.is_valid:
        return Converted(record, "", f"{reading.trajectory.dialect}: {reading.defects[0]}")
    try:
        return Converted(record, convert(reading.trajectory, to).text)
    except ConversionError as error:
        return Converted(record, "", str(error))
