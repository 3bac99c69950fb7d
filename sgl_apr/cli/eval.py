"""`sgl-apr eval`: evaluate methods on tasks, or compare two evaluations."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_apr.cli.eval_arguments import AT_ONCE, COST_FILE, TIMED_PROBLEMS, add_arguments, parse_methods
from sgl_apr.cli.method_options import check_methods, options_of
from sgl_apr.errors import AprError

if TYPE_CHECKING:
    from sgl_apr.evaluation.benchmarks.base import Benchmark
    from sgl_apr.evaluation.cost_model import EngineCost
    from sgl_apr.evaluation.metrics import MethodResults
    from sgl_apr.evaluation.store import ResultStore
    from sgl_apr.evaluation.sweep import SweepLevel

# Methods whose answer is a single reply of the model: greedy unless a temperature is given.
SINGLE_REPLY_METHODS = ("sequential", "threadweaver", "multiverse", "npr", "parallel_r1", "apr")
WINDOWS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048)  # tokens


@dataclass(frozen=True)
class _Evaluation:
    """A task under its budget.

    Attributes:
        task: The task, with the budget.
        level: The value of the limit that is swept.
        directory: Where attempts are kept.
        at_once: Problems under way at the same time.
    """

    task: Benchmark
    level: SweepLevel | None
    directory: Path | None
    at_once: int

    @property
    def name(self) -> str:
        return f"{self.task.name}, {self.level}" if self.level else self.task.name


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
        "  sgl-apr eval countdown --model builtin --methods all --limit 50 --sweep tokens=256,512,1024 --sweep seconds=2,4 -o out\n"
        "  sgl-apr eval --compare out:apr out:sequential                            # on the same problems",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
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
    from sgl_apr.evaluation.sweep import compare_with_best
    from sgl_apr.evaluation.timing import load_or_measure_cost
    from sgl_apr.methods.registry import check_arguments
    from sgl_apr.server.launch.launcher import Server
    from sgl_apr.training.models import locate_model

    methods = parse_methods(options.methods)
    check_methods(options.option, methods)
    tasks = [benchmark(name, options.limit, options.split, options.seed) for name in options.tasks]
    evaluations = _evaluations(options, tasks)
    if options.option:
        for name in methods:
            check_arguments(name, tasks[0].task, options_of(name, options.option))
    results: list[tuple[_Evaluation, list[MethodResults]]] = []
    summaries: list[dict[str, Any]] = []
    with ExitStack() as stack:
        stores = [
            stack.enter_context(open_evaluation(each.directory, _settings(options, each)))
            for each in evaluations
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
        for each, store in zip(evaluations, stores, strict=True):
            timed = len(methods) > 1 and each.level is None
            rows = [asyncio.run(_run(options, url, each, m, store, timed, cost)) for m in methods]
            summary: dict[str, Any] = {"task": each.task.name, "rows": [row.as_json(WINDOWS) for row in rows]}
            if each.level:
                summary |= asdict(each.level) | {"compared_with_best": compare_with_best(rows)}
            if cost:
                summary["cost"] = asdict(cost)
            if each.directory:
                complete = {**summary, **_comparable_rows(rows, each.task, store)}
                _write_summary(each.directory / SUMMARY_FILE, complete)
            summaries.append(summary)
            results.append((each, rows))
    if options.json:
        print(json.dumps(summaries[0] if len(summaries) == 1 else {"tasks": summaries}))
    else:
        from sgl_apr.cli.eval_tables import print_results

        for each, rows in results:
            print_results(each.name, rows, several=len(results) > 1, wide=options.wide)
    return int(not any(row.attempts for _, rows in results for row in rows))


def _evaluations(options: argparse.Namespace, tasks: Sequence[Benchmark]) -> list[_Evaluation]:
    """The tasks under their budgets: one each, or one for each value of the limits that are swept."""
    from sgl_apr.evaluation.sweep import parse_levels

    levels = list(dict.fromkeys(level for text in options.sweep for level in parse_levels(text)))
    evaluations = []
    for task, directory in zip(tasks, _task_directories(options.out, tasks), strict=True):
        task = replace(task, budget=options.budget or task.budget)
        if not levels:
            evaluations.append(_Evaluation(task, None, directory, options.at_once or AT_ONCE))
        for level in levels:
            under = replace(task, budget=level.applied_to(task.budget))
            at_once = options.at_once or (1 if level.limit == "seconds" else AT_ONCE)
            evaluations.append(_Evaluation(under, level, directory and directory / level.directory, at_once))
    return evaluations


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


def _settings(options: argparse.Namespace, evaluation: _Evaluation) -> dict[str, Any]:
    """What all attempts of an evaluation have in common, for the head of its file."""
    task = evaluation.task
    return {
        "task": task.name, "model": options.model or options.url, "limit": options.limit, "split": options.split,
        "seed": options.seed, "temperature": options.temperature, "budget": asdict(task.budget),
        "at_once": evaluation.at_once,
    } | ({"options": [asdict(option) for option in options.option]} if options.option else {})  # fmt: skip


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
    evaluation: _Evaluation,
    method: str,
    store: ResultStore,
    timed: bool,
    cost: EngineCost | None,
) -> MethodResults:
    """Evaluate one method on one task, with a progress bar on stderr. `timed`: and with one request at a time."""
    from rich.console import Console
    from rich.progress import Progress

    from sgl_apr.evaluation.runner import evaluate, time_alone

    task = evaluation.task
    method_options: dict[str, Any] = {"budget": task.budget}
    if options.temperature is not None or method in SINGLE_REPLY_METHODS:
        method_options["temperature"] = options.temperature or 0.0
    elif method == "pro":
        method_options["single_temperature"] = 0.0
    if options.allow_code and method == "recursive":
        method_options["allow_code"] = True
    method_options |= options_of(method, options.option)
    with Progress(console=Console(stderr=True)) as progress:
        attempts, total = store.attempts.get(method, {}), len(task.cases)
        done = sum(key in attempts for key in task.keyed_cases)
        bar = progress.add_task(f"{evaluation.name}, {method}", total=total, completed=done)
        row = await evaluate(
            url, task, method, store, on_attempt=lambda: progress.advance(bar), at_once=evaluation.at_once, cost=cost,
            api_key=options.api_key, **method_options,
        )  # fmt: skip
        if timed and row.attempts:
            progress.update(bar, description=f"{evaluation.name}, {method}, one request at a time")
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
