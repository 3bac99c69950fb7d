"""`sgl-apr eval countdown`: which model is asked, in which ways, and how what it came to is shown."""

from __future__ import annotations

import argparse
import asyncio
import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_apr.budget import Budget
from sgl_apr.errors import AprError
from sgl_apr.methods.result import MODULES

if TYPE_CHECKING:
    from sgl_apr.tasks.evaluated import Evaluated
    from sgl_apr.tasks.evaluation import Row

ALONE = 2  # problems on which a method is timed against itself, one request at a time
# Those that a single reply of the model is the answer of: greedy, unless asked otherwise.
ONE_REPLY = ("sequential", "threadweaver", "multiverse", "npr", "parallel_r1", "apr")
WINDOWS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048)


def add_commands(commands: Any) -> None:
    """Add `eval` to an argparse parser."""
    parser = commands.add_parser(
        "eval",
        help="how well a model solves a task, and at what cost",
        epilog="examples:\n"
        "  sgl-apr eval countdown --model builtin --json\n"
        "  sgl-apr eval countdown --model runs/parallel/model --limit 200 -o out    # again: goes on where it was\n"
        "  sgl-apr eval countdown --url http://127.0.0.1:30000 --methods apr,sequential --json -o out\n"
        "  sgl-apr eval countdown --model builtin --methods all --limit 10 --budget tokens=1024",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=["countdown"])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--model", help="a checkpoint, served for the time being; builtin: the one that comes with sgl_apr"
    )
    which.add_argument("--url", help="a running server")
    parser.add_argument(
        "--methods",
        default="apr",
        help=f"some of {', '.join(MODULES)}, or all (default: %(default)s). With several, each is also timed on "
        f"{ALONE} problems against itself with one request at a time",
    )
    parser.add_argument("--limit", type=int, default=2000, help="problems (default: %(default)s)")
    parser.add_argument(
        "--split",
        default="test",
        choices=["test", "train"],
        help="train: to choose settings by (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default: %(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        help="default: what a method's paper says, and 0 for those that ask for one reply",
    )
    parser.add_argument(
        "--budget",
        type=Budget.parse,
        default=Budget(tokens=6000, width=16, branch_tokens=160),
        metavar="NAME=N,...",
        help="of each reply",
    )
    parser.add_argument("--at-once", type=int, default=512, help="replies under way (default: %(default)s)")
    parser.add_argument(
        "-o", "--out", type=Path, help="a directory for run.jsonl, a line as each ends, and summary.json"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(command=_eval)


def _eval(options: argparse.Namespace) -> int:
    from sgl_apr.models import located
    from sgl_apr.server.launch import Server
    from sgl_apr.tasks.evaluated import evaluated
    from sgl_apr.tasks.solving import SERVER

    methods = list(MODULES) if options.methods == "all" else options.methods.split(",")
    if unknown := [m for m in methods if m not in MODULES]:
        raise AprError(f"no method {unknown[0]!r}, expected all, or some of {', '.join(MODULES)}")
    asked = {
        "task": options.task, "model": options.model or options.url, "limit": options.limit, "split": options.split, "seed": options.seed,
        "temperature": options.temperature, "budget": asdict(options.budget), "at_once": options.at_once,
    }  # fmt: skip
    with ExitStack() as stack:
        found = stack.enter_context(evaluated(options.out, asked))
        url = options.url
        if url is None:
            path = located(options.model)
            url = stack.enter_context(Server(path, **SERVER)).url
        rows = [asyncio.run(_run(options, url, method, found, len(methods) > 1)) for method in methods]
    summary = {"task": options.task, "rows": [row.as_json(WINDOWS) for row in rows]}
    if options.out:
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(summary))
    else:
        _show(rows)
    return int(not any(row.attempts for row in rows))


async def _run(options: argparse.Namespace, url: str, method: str, found: Evaluated, several: bool) -> Row:
    from rich.console import Console
    from rich.progress import Progress

    from sgl_apr.tasks.countdown import problems
    from sgl_apr.tasks.evaluated import alone, evaluate

    given = list(problems(options.limit, options.split, seed=options.seed))
    asked: dict[str, Any] = {"by": method, "budget": options.budget}
    if options.temperature is not None or method in ONE_REPLY:
        asked["temperature"] = options.temperature or 0.0
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(method, total=len(given), completed=len(found.attempts.get(method, ())))
        row = await evaluate(
            url, given, method, found, on_attempt=lambda: progress.advance(bar), at_once=options.at_once, **asked
        )  # fmt: skip
        if several and row.attempts:
            progress.update(bar, description=f"{method}, one request at a time")
            row = replace(row, alone=await alone(url, given[:ALONE], **asked))
    return row


def _show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "method", "accuracy", "95% CI", "total tokens", "critical path", "forked", "calls", "cached", "wall s",
        "one by one",
    )  # fmt: skip
    notes = dict[str, list[str]]()
    for row in rows:
        notes.setdefault(row.label or row.reason, []).append(row.method)
        if not row.attempts:
            table.add_row(row.method, *["-"] * 9)
            continue
        low, high = row.ci95
        table.add_row(
            row.method, f"{row.accuracy:.1%}", f"{low:.1%} - {high:.1%}", f"{row.mean(lambda a: a.tokens):.0f}",
            f"{row.mean(lambda a: a.critical_path):.0f}", f"{row.mean(lambda a: bool(a.forks)):.0%}",
            f"{row.mean(lambda a: a.calls):.1f}", f"{row.cached_share:.0%}", f"{row.wall_s:.1f}",
            f"{row.alone[1] / row.alone[0]:.1f}x" if row.alone else "-",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for note, methods in notes.items():
        if note != "exact":
            console.print(f"{', '.join(methods)}: {note}", markup=False, highlight=False, soft_wrap=True)
