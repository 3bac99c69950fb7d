"""`sgl-apr eval`: which model is asked what, in which ways; and how evaluations are compared."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_apr.errors import AprError
from sgl_apr.methods.registry import METHOD_MODULES
from sgl_apr.runtime.budget import Budget

if TYPE_CHECKING:
    from sgl_apr.evaluation.benchmarks.base import Benchmark
    from sgl_apr.evaluation.cost_model import EngineCost
    from sgl_apr.evaluation.metrics import MethodResults
    from sgl_apr.evaluation.store import ResultStore

ALONE = 2  # problems on which a method is timed against itself, one request at a time
# Those that a single reply of the model is the answer of: greedy, unless asked otherwise.
ONE_REPLY = ("sequential", "threadweaver", "multiverse", "npr", "parallel_r1", "apr")
WINDOWS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048)
COST = "cost.json"


def add_commands(commands: Any) -> None:
    """Add `eval` to an argparse parser."""
    parser = commands.add_parser(
        "eval",
        help="how well a model solves tasks, and at what cost",
        epilog="examples:\n"
        "  sgl-apr eval countdown --model builtin --json\n"
        "  sgl-apr eval countdown --model runs/parallel/model --limit 200 -o out    # again: goes on where it was\n"
        "  sgl-apr eval countdown --url http://127.0.0.1:30000 --methods apr,sequential --json -o out\n"
        "  sgl-apr eval game24 --model builtin --methods all --limit 10 --budget tokens=1024 --cost-model\n"
        "  sgl-apr eval gym:leg_counting aime.jsonl --model my-model --methods threadweaver,self_consistency -o out\n"
        "  sgl-apr eval --compare out:apr out:sequential                            # on the same problems",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "tasks",
        nargs="*",
        metavar="TASK",
        help="countdown; game24; gym:NAME, a dataset of reasoning-gym (pip install 'sgl-apr[gym]'); or FILE.jsonl, a line "
        'for each problem: {"problem": ..., "answer": ..., "id": ..., "level": ...}. Several: each in a directory of '
        "its own in that of -o",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", help="a checkpoint, served for the time being; builtin: the one that comes with sgl_apr"
    )
    which.add_argument("--url", help="a running server")
    which.add_argument(
        "--compare",
        nargs=2,
        metavar="RUN[:METHOD]",
        help="two directories that -o has written, or their files: paired tests on the problems that both tried",
    )
    parser.add_argument(
        "--methods",
        default="apr",
        help=f"some of {', '.join(METHOD_MODULES)}, or all (default: %(default)s). With several, each is also timed on "
        f"{ALONE} problems against itself with one request at a time",
    )
    parser.add_argument(
        "--limit", type=int, default=2000, help="problems of each task at most (default: %(default)s)"
    )
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
        type=_budget,
        metavar="NAME=N,...",
        help="of each reply; by default tokens=6000,width=16,branch_tokens=160 for countdown and game24, tokens=4096 for "
        "others",
    )
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="let the method recursive run Python that the model writes, in a sandbox",
    )
    parser.add_argument(
        "--cost-model",
        action="store_true",
        help="time the server's prompts and steps for some seconds first, to say what forks should gain there: "
        f"{COST} in the directory of -o, which is read if it is there",
    )
    parser.add_argument("--at-once", type=int, default=512, help="replies under way (default: %(default)s)")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        help="a directory for run.jsonl, a line as each attempt ends, and summary.json",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(command=lambda options: _eval(parser, options))


def _budget(text: str) -> Budget:
    try:
        return Budget.parse(text)
    except AprError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _eval(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.compare:
        if options.tasks:
            parser.error("--compare reads what was evaluated, expected no task")
        return _compare(options)
    if not options.tasks or not (options.model or options.url):
        parser.error("expected tasks, and --model or --url; or --compare")

    from sgl_apr.evaluation.benchmarks.registry import benchmark
    from sgl_apr.evaluation.store import SUMMARY_FILE, open_evaluation
    from sgl_apr.server.launch.launcher import Server
    from sgl_apr.training.models import locate_model

    methods = list(METHOD_MODULES) if options.methods == "all" else options.methods.split(",")
    if unknown := [m for m in methods if m not in METHOD_MODULES]:
        raise AprError(f"no method {unknown[0]!r}, expected all, or some of {', '.join(METHOD_MODULES)}")
    given = [benchmark(name, options.limit, options.split, options.seed) for name in options.tasks]
    places = _places(options.out, given)
    summaries: list[dict[str, Any]] = []
    shown: list[tuple[str, list[MethodResults]]] = []
    with ExitStack() as stack:
        files = [
            stack.enter_context(open_evaluation(place, _asked(options, task)))
            for task, place in zip(given, places, strict=True)
        ]
        url = options.url
        if url is None:
            flags = {name: value for task in given for name, value in task.flags.items()}
            url = stack.enter_context(Server(locate_model(options.model), **flags)).url
        cost = asyncio.run(_cost(url, options.out)) if options.cost_model else None
        for task, place, found in zip(given, places, files, strict=True):
            rows = [asyncio.run(_run(options, url, task, m, found, len(methods) > 1, cost)) for m in methods]
            summary: dict[str, Any] = {"task": task.name, "rows": [row.as_json(WINDOWS) for row in rows]}
            if cost:
                summary["cost"] = asdict(cost)
            if place:
                (place / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            summaries.append(summary)
            shown.append((task.name, rows))
    if options.json:
        print(json.dumps(summaries[0] if len(summaries) == 1 else {"tasks": summaries}))
    else:
        from sgl_apr.cli.eval_tables import show

        for name, rows in shown:
            show(name, rows, len(shown) > 1)
    return int(not any(row.attempts for _, rows in shown for row in rows))


def _asked(options: argparse.Namespace, task: Benchmark) -> dict[str, Any]:
    """What all attempts at a task have in common."""
    return {
        "task": task.name, "model": options.model or options.url, "limit": options.limit, "split": options.split,
        "seed": options.seed, "temperature": options.temperature, "budget": asdict(options.budget or task.budget),
        "at_once": options.at_once,
    }  # fmt: skip


def _places(out: Path | None, given: Sequence[Benchmark]) -> list[Path | None]:
    """Where each task is kept."""
    if out is None or len(given) == 1:
        return [out] * len(given)
    if len({task.directory for task in given}) < len(given):
        raise AprError(
            f"two tasks of one name in {', '.join(t.name for t in given)}, expected different ones"
        )
    return [out / task.directory for task in given]


async def _cost(url: str, out: Path | None) -> EngineCost:
    from sgl_apr.engine.http import HttpEngine
    from sgl_apr.evaluation.cost_model import EngineCost
    from sgl_apr.evaluation.timing import EngineTimer

    if out and (path := out / COST).exists():
        return EngineCost.from_json(path.read_text(encoding="utf-8"))
    async with await HttpEngine.connect(url) as engine:
        cost = await EngineTimer(engine).measure_cost()
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / COST).write_text(cost.to_json() + "\n", encoding="utf-8")
    return cost


async def _run(
    options: argparse.Namespace,
    url: str,
    task: Benchmark,
    method: str,
    found: ResultStore,
    several: bool,
    cost: EngineCost | None,
) -> MethodResults:
    from rich.console import Console
    from rich.progress import Progress

    from sgl_apr.evaluation.runner import evaluate, time_alone

    asked: dict[str, Any] = {"budget": options.budget or task.budget}
    if options.temperature is not None or method in ONE_REPLY:
        asked["temperature"] = options.temperature or 0.0
    if options.allow_code and method == "recursive":
        asked["allow_code"] = True
    with Progress(console=Console(stderr=True)) as progress:
        done, total = len(found.attempts.get(method, ())), len(task.cases)
        bar = progress.add_task(f"{task.name}, {method}", total=total, completed=done)
        row = await evaluate(
            url, task, method, found, on_attempt=lambda: progress.advance(bar), at_once=options.at_once, cost=cost,
            **asked,
        )  # fmt: skip
        if several and row.attempts:
            progress.update(bar, description=f"{task.name}, {method}, one request at a time")
            row = replace(row, alone=await time_alone(url, task, ALONE, method, **asked))
    return row


def _compare(options: argparse.Namespace) -> int:
    from sgl_apr.cli.eval_tables import show_pairs
    from sgl_apr.evaluation.compare import pair_evaluations

    found = pair_evaluations(*options.compare)
    if options.json:
        print(json.dumps({"pairs": [pair.as_json() for pair in found]}))
    else:
        show_pairs(found)
    return 0
