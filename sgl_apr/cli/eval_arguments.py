"""The arguments of `sgl-apr eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgl_apr.cli.arguments import ALLOW_CODE_HELP, add_api_key, parse_budget, parse_count
from sgl_apr.cli.method_options import add_method_options
from sgl_apr.errors import AprError
from sgl_apr.methods.registry import METHOD_MODULES
from sgl_apr.runtime.value_checks import unknown_name

AT_ONCE = 512  # problems, by default; one where a deadline is measured
COST_FILE = "cost.json"
TIMED_PROBLEMS = 2  # on which each of several methods is also timed with one request at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to a parser."""
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
        help="limits of each reply (default: tokens=6000 for countdown and game24, tokens=4096 for others)",
    )
    add_method_options(parser)
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="LIMIT=N,N,...",
        help="evaluate once for each value of a limit of the budget: tokens, critical_tokens, calls, or seconds. Each value has its own "
        "directory in that of -o, and `sgl-apr plot` and `sgl-apr report` draw the curves. May be given several times",
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
        help=f"problems under way at the same time (default: {AT_ONCE}, and 1 where --sweep sets a deadline)",
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
