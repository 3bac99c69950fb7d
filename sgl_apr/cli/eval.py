"""`sgl-apr eval`: evaluate methods on tasks, or compare two evaluations."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_apr.cli.arguments import ALLOW_CODE_HELP, add_api_key, parse_budget, parse_count
from sgl_apr.errors import AprError
from sgl_apr.methods.registry import METHOD_MODULES
from sgl_apr.runtime.value_checks import unknown_name

if TYPE_CHECKING:
    from sgl_apr.evaluation.benchmarks.base import Benchmark
    from sgl_apr.evaluation.cost_model import EngineCost
    from sgl_apr.evaluation.metrics import MethodResults
    from sgl_apr.evaluation.store import ResultStore

TIMED_PROBLEMS = 2  # on which each of several methods is also timed with one request at a time
# Methods whose answer is a single reply of the model: greedy unless a temperature is given.
SINGLE_REPLY_METHODS = ("sequential", "threadweaver", "multiverse", "npr", "parallel_r1", "apr")
WINDOWS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048)  # tokens
COST_FILE = "cost.json"


def add_command(commands: Any) -> None:
    """Add `eval` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "eval",
        help="measure how well a model solves tasks, and at what cost",
        epilog="examples:\n"
        "  sgl-apr eval countdown --model builtin --json\n"
        "  sgl-apr eval countdown --model runs/parallel/model --limit 200 -o out    # again: continues where it stopped\n"
        "  sgl-apr eval countdown --model runs/parallel/model --limit 500 -o out    # 300 problems more\n"
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
        help="countdown, of three and four numbers; countdown:5, countdown:unsolvable or countdown:5,unsolvable; game24; gym:NAME, a dataset of reasoning-gym (of the extra gym); ledger:4k, questions about a text of so many tokens; or FILE.jsonl, one "
        'problem per line: {"problem": ..., "answer": ..., "id": ..., "level": ...}. With several tasks, each gets its '
        "own directory in that of -o",
    )
    server = parser.add_mutually_exclusive_group()
    server.add_argument(
        "--model",
        help="a checkpoint to serve meanwhile, or a name that `sgl-apr model` knows, such as builtin",
    )
    server.add_argument("--url", help="a running server")
    server.add_argument(
        "--compare",
        nargs=2,
        metavar="RUN[:METHOD]",
        help="two directories that -o wrote, or their files: paired tests on the problems that both attempted",
    )
    add_api_key(parser)
    parser.add_argument(
        "--methods",
        default="apr",
        help=f"some of {', '.join(METHOD_MODULES)}, or all (default: %(default)s). With several, each is also timed on "
        f"{TIMED_PROBLEMS} problems with one request at a time",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=2000,
        help="problems of each task and seed at most (default: %(default)s)",
    )
    parser.add_argument(
        "--split",
        default="test",
        choices=["test", "train"],
        help="train: problems to choose settings by (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=parse_seeds,
        default=0,
        metavar="N[,N...]",
        help="seed of the problems, or several (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="default: that of the method's paper, and 0 for methods with a single reply",
    )
    parser.add_argument(
        "--budget",
        type=parse_budget,
        metavar="NAME=N,...",
        help="limits of each reply (default: tokens=6000,width=16,branch_tokens=160 for countdown and game24, tokens=4096 "
        "for others)",
    )
    parser.add_argument("--allow-code", action="store_true", help=ALLOW_CODE_HELP)
    parser.add_argument(
        "--cost-model",
        action="store_true",
        help="first measure the server's prompts and decoding steps for some seconds, to predict what forks gain there; kept as "
        f"{COST_FILE} in the directory of -o, and read from there the next time",
    )
    parser.add_argument(
        "--at-once",
        type=parse_count,
        default=512,
        help="problems under way at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        help="a directory for run.jsonl, one line per attempt, and summary.json. A directory with attempts is continued: "
        "with another --limit, --seed or --methods only what is new is run; other options have to be the same",
    )
    parser.add_argument(
        "--wide", action="store_true", help="print all columns of the table, however wide the terminal is"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(command=lambda options: _eval(parser, options))


def _eval(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.compare:
        if options.tasks:
            parser.error("--compare reads finished evaluations, expected no task")
        return _compare(options)
    if not options.tasks:
        parser.error(
            "no task: expected some of countdown, game24, gym:NAME, ledger:SIZE, FILE.jsonl; or --compare"
        )
    if not (options.model or options.url):
        parser.error("no model: expected --model or --url")

    from sgl_apr.evaluation.benchmarks.registry import benchmark
    from sgl_apr.evaluation.store import SUMMARY_FILE, open_evaluation
    from sgl_apr.evaluation.timing import load_or_measure_cost
    from sgl_apr.server.launch.launcher import Server
    from sgl_apr.training.models import locate_model

    methods = parse_methods(options.methods)
    tasks = [benchmark(name, options.limit, options.split, options.seed) for name in options.tasks]
    directories = _task_directories(options.out, tasks)
    summaries: list[dict[str, Any]] = []
    results: list[tuple[str, list[MethodResults]]] = []
    with ExitStack() as stack:
        stores = [
            stack.enter_context(open_evaluation(directory, _settings(options, task)))
            for task, directory in zip(tasks, directories, strict=True)
        ]
        url = options.url
        if url is None:
            flags = {name: value for task in tasks for name, value in task.flags.items()}
            url = stack.enter_context(
                Server(locate_model(options.model), api_key=options.api_key, **flags)
            ).url
        cost = None
        if options.cost_model:
            path = options.out and options.out / COST_FILE
            cost = asyncio.run(load_or_measure_cost(url, path, api_key=options.api_key))
        for task, directory, store in zip(tasks, directories, stores, strict=True):
            several = len(methods) > 1
            rows = [asyncio.run(_run(options, url, task, m, store, several, cost)) for m in methods]
            summary: dict[str, Any] = {"task": task.name, "rows": [row.as_json(WINDOWS) for row in rows]}
            if cost:
                summary["cost"] = asdict(cost)
            if directory:
                complete = {**summary, **_comparable_rows(rows, task, store)}
                _write_summary(directory / SUMMARY_FILE, complete)
            summaries.append(summary)
            results.append((task.name, rows))
    if options.json:
        print(json.dumps(summaries[0] if len(summaries) == 1 else {"tasks": summaries}))
    else:
        from sgl_apr.cli.eval_tables import print_results

        for name, rows in results:
            print_results(name, rows, several=len(results) > 1, wide=options.wide)
    return int(not any(row.attempts for _, rows in results for row in rows))


def parse_methods(text: str) -> list[str]:
    """Parse the names of methods that commas separate, or `all`.

    Raises:
        AprError: There is no name, or no method of a name.
    """
    names = [name.strip() for name in text.split(",")]
    methods = list(METHOD_MODULES) if names == ["all"] else list(dict.fromkeys(filter(None, names)))
    if not methods:
        raise AprError(f"--methods {text!r}, expected all, or some of {', '.join(METHOD_MODULES)}")
    for name in methods:
        if name not in METHOD_MODULES:
            raise AprError(unknown_name(name, ["all", *METHOD_MODULES], "method "))
    return methods


def parse_seeds(text: str) -> int | list[int]:
    """Parse one seed, or several that commas separate, for argparse."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected whole numbers such as 0 or 0,1,2") from None
    return seeds[0] if len(seeds) == 1 else seeds


def _comparable_rows(rows: Sequence[MethodResults], task: Benchmark, store: ResultStore) -> dict[str, Any]:
    """The rows of a summary: the methods of this command and of earlier ones, on the problems that all attempted."""
    from sgl_apr.evaluation.store import SUMMARY_FILE, common_problems, describe_left_out

    earlier = [m for m in store.attempts if m not in {row.method for row in rows}]
    names = [*(row.method for row in rows if row.attempts), *earlier]
    attempted = {m: keys for m in names if (keys := [k for k in task.keyed_cases if k in store.attempts[m]])}
    common, left_out = common_problems(attempted)
    if left_out and not common:
        print(
            f"{SUMMARY_FILE} has the methods of this command only: no problem is common to all",
            file=sys.stderr,
        )
        return {}
    shared = {m: store.results_of(m, [k for k in task.keyed_cases if k in common]) for m in attempted}
    shown = [replace(shared[r.method], alone=r.alone) if r.attempts else r for r in rows]
    shown += [shared[m] for m in earlier if m in shared]
    if left_out:
        print(f"{SUMMARY_FILE}: {describe_left_out(left_out, [*attempted])}", file=sys.stderr)
    return {"rows": [row.as_json(WINDOWS) for row in shown]} | ({"left_out": left_out} if left_out else {})


def _write_summary(path: Path, summary: dict[str, Any]) -> None:
    from sgl_apr.trajectory.jsonl import file_error

    try:
        path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise file_error("cannot write to", path, error) from None


def _settings(options: argparse.Namespace, task: Benchmark) -> dict[str, Any]:
    """What all attempts at a task have in common, for the head of its file."""
    return {
        "task": task.name, "model": options.model or options.url, "limit": options.limit, "split": options.split,
        "seed": options.seed, "temperature": options.temperature, "budget": asdict(options.budget or task.budget),
        "at_once": options.at_once,
    }  # fmt: skip


def _task_directories(out: Path | None, tasks: Sequence[Benchmark]) -> list[Path | None]:
    if out is None or len(tasks) == 1:
        return [out] * len(tasks)
    if len({task.directory for task in tasks}) < len(tasks):
        raise AprError(
            f"two tasks of the same name in {', '.join(t.name for t in tasks)}, expected different names"
        )
    return [out / task.directory for task in tasks]


async def _run(
    options: argparse.Namespace,
    url: str,
    task: Benchmark,
    method: str,
    store: ResultStore,
    several: bool,
    cost: EngineCost | None,
) -> MethodResults:
    """Evaluate one method on one task, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    from sgl_apr.evaluation.runner import evaluate, time_alone

    method_options: dict[str, Any] = {"budget": options.budget or task.budget}
    if options.temperature is not None or method in SINGLE_REPLY_METHODS:
        method_options["temperature"] = options.temperature or 0.0
    if options.allow_code and method == "recursive":
        method_options["allow_code"] = True
    with Progress(console=Console(stderr=True)) as progress:
        attempts, total = store.attempts.get(method, {}), len(task.cases)
        done = sum(key in attempts for key in task.keyed_cases)
        bar = progress.add_task(f"{task.name}, {method}", total=total, completed=done)
        row = await evaluate(
            url, task, method, store, on_attempt=lambda: progress.advance(bar), at_once=options.at_once, cost=cost,
            api_key=options.api_key, **method_options,
        )  # fmt: skip
        if several and row.attempts:
            progress.update(bar, description=f"{task.name}, {method}, one request at a time")
            alone = await time_alone(
                url, task, TIMED_PROBLEMS, method, api_key=options.api_key, **method_options
            )
            row = replace(row, alone=alone)
    return row


def _compare(options: argparse.Namespace) -> int:
    from sgl_apr.cli.eval_tables import print_comparisons
    from sgl_apr.evaluation.compare import pair_evaluations

    pairs = pair_evaluations(*options.compare)
    if options.json:
        print(json.dumps({"pairs": [pair.as_json() for pair in pairs]}))
    else:
        print_comparisons(pairs, wide=options.wide)
    return 0
