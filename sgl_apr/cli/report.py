"""`sgl-apr report`: write trajectories into one HTML page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_apr.errors import AprError

if TYPE_CHECKING:
    from sgl_apr.views.page_entry import PageEntry


def add_command(commands: Any) -> None:
    """Add `report` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "report",
        help="show trajectories in one HTML page: timelines, texts, plots",
        epilog="examples:\n"
        "  sgl-apr report out -o report.html                 # the output of `sgl-apr eval ... -o out`\n"
        "  sgl-apr report answers.jsonl                      # the output of `apr.run_many`\n"
        "  sgl-apr report parallel sequential --title Twins  # two evaluations on one page\n\n"
        "The page is a single file, needs no network, and works on a phone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a .jsonl file, or a directory with a run.jsonl; with several, methods are labelled with their file",
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), help="the page to write (default: %(default)s)"
    )
    parser.add_argument("--title", help="title of the page (default: the names of the inputs)")
    parser.add_argument(
        "--json", action="store_true", help="print what was written as JSON, not just its path"
    )
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from sgl_apr.evaluation.report_files import (
        count_trajectories,
        describe_evaluations,
        describe_incomparable,
        expand_sweeps,
        read_entries,
    )
    from sgl_apr.views.page import render_page

    title = options.title or ", ".join(map(str, options.inputs))
    inputs = expand_sweeps(options.inputs)
    lines = count_trajectories(inputs)
    if not lines:
        raise AprError(f"no trajectory in {title}")
    console, shown = Console(stderr=True), 0
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        incomparable = describe_incomparable(inputs)
        facts = " · ".join(filter(None, [describe_evaluations(inputs), incomparable]))
        entries = read_entries(inputs, comparable=True)

        def counted() -> Iterator[PageEntry]:
            nonlocal shown
            for entry in progress.track(entries, total=lines, description="trajectories"):
                shown += 1
                yield entry

        text = render_page(counted(), title, facts)
    data = text.encode(errors="replace")  # the name of a file may not be valid text
    try:
        options.out.write_bytes(data)
    except OSError as error:
        raise AprError(f"cannot write {options.out}: {error}") from None
    if incomparable:
        print(incomparable, file=sys.stderr)
    written = {"page": str(options.out), "trajectories": shown, "bytes": len(data)}
    print(json.dumps(written) if options.json else options.out)
    return 0
