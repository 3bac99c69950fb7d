"""`sgl-apr eval countdown`: which model is asked, in which ways, and how what it came to is shown."""

from __future__ import annotations

import argparse
import asyncio
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_apr.budget import Budget
from sgl_apr.errors import AprError

if TYPE_CHECKING:
    from sgl_apr.tasks.evaluated import Evaluated
    from sgl_apr.tasks.evaluation import Row

METHODS = {"apr": "auto", "sequential": "sequential", "parallel": "parallel"}
WINDOWS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048)


def add_commands(commands: Any) -> None:
    """Add `eval` to an argparse parser."""
    parser = commands.add_parser(
        "eval",
        help="how well a model solves a task, and at what cost",
        epilog="examples:\n"
        "  sgl-apr eval countdown --model builtin --json\n"
        "  sgl-apr eval countdown --model runs/parallel/model --limit 200 -o out    # again: goes on where it was\n"
        "  sgl-apr eval countdown --url http://127.0.0.1:30000 --methods apr,sequential --json -o out",
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
        help=f"some of {', '.join(METHODS)}: the model decides, may not fork, has to (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, default=2000, help="problems (default: %(default)s)")
    parser.add_argument(
        "--split",
        default="test",
        choices=["test", "train"],
        help="train: to choose settings by (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: %(default)s")
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

    methods = options.methods.split(",")
    if unknown := [m for m in methods if m not in METHODS]:
        raise AprError(f"no method {unknown[0]!r}, expected some of {', '.join(METHODS)}")
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
        rows = [asyncio.run(_run(options, url, method, found)) for method in methods]
    summary = {"task": options.task, "rows": [row.as_json(WINDOWS) for row in rows]}
    if options.out:
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(summary))
    else:
        _show(rows)
    return 0


async def _run(options: argparse.Namespace, url: str, method: str, found: Evaluated) -> Row:
    from rich.console import Console
    from rich.progress import Progress

    from sgl_apr.tasks.countdown import problems
    from sgl_apr.tasks.evaluated import evaluate

    given = list(problems(options.limit, options.split, seed=options.seed))
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(method, total=len(given), completed=len(found.attempts.get(method, ())))
        return await evaluate(
            url, given, method, found, on_attempt=lambda: progress.advance(bar), at_once=options.at_once,
            mode=METHODS[method], temperature=options.temperature, budget=options.budget,
        )  # fmt: skip


def _show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "accuracy", "95% CI", "total tokens", "critical path", "forked", "wall s")
    for row in rows:
        low, high = row.ci95
        table.add_row(
            row.method, f"{row.accuracy:.1%}", f"{low:.1%} - {high:.1%}", f"{row.mean(lambda a: a.tokens):.0f}",
            f"{row.mean(lambda a: a.critical_path):.0f}", f"{row.mean(lambda a: bool(a.forks)):.0%}",
            f"{row.wall_s:.1f}",
        )  # fmt: skip
    Console().print(table)
