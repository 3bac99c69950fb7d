"""`sgl-apr report`: files with trajectories into one HTML page; what is on it is the page's business."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError


def add_commands(commands: Any) -> None:
    """Add `report` to an argparse parser."""
    parser = commands.add_parser(
        "report",
        help="show trajectories in one HTML page: timelines, texts, plots",
        epilog="examples:\n"
        "  sgl-apr report out -o report.html                 # of `sgl-apr eval ... -o out`\n"
        "  sgl-apr report answers.jsonl                      # of `apr.run_many`\n"
        "  sgl-apr report parallel sequential --title Twins  # beside one another\n\n"
        "The page needs no network and nothing beside it, and works on a phone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a .jsonl file, or a directory with run.jsonl; of several, methods go by the names of their files too",
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="default: %(default)s")
    parser.add_argument("--title", help="default: the names of the inputs")
    parser.add_argument(
        "--json", action="store_true", help="print what was written as JSON, not just its path"
    )
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from sgl_apr.evaluation.report_files import count_trajectories, read_entries, describe_evaluations
    from sgl_apr.views.page import render_page

    title = options.title or ", ".join(map(str, options.inputs))
    lines = count_trajectories(options.inputs)
    if not lines:
        raise AprError(f"no trajectory in {title}")
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        found = progress.track(read_entries(options.inputs), total=lines, description="trajectories")
        text = render_page(found, title, describe_evaluations(options.inputs))
    data = text.encode(errors="replace")  # the name of a file may be no text
    try:
        options.out.write_bytes(data)
    except OSError as error:
        raise AprError(f"cannot write {options.out}: {error}") from None
    written = {"page": str(options.out), "trajectories": lines, "bytes": len(data)}
    print(json.dumps(written) if options.json else options.out)
    return 0
