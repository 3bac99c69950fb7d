"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sgl_apr.errors import AprError, GrammarError
from sgl_apr.runtime.budget import Budget

if TYPE_CHECKING:
    from sgl_apr.formats.dialects import Dialect

ALLOW_CODE_HELP = "let the method recursive run Python that the model writes, in a sandbox"


def parse_budget(text: str) -> Budget:
    """Parse a budget such as `tokens=2000,width=4` for argparse."""
    try:
        return Budget.parse(text)
    except AprError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_count(text: str) -> int:
    """Parse a whole number of at least 1 for argparse."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return count


def parse_seconds(text: str) -> float:
    """Parse a number of seconds of at least 0 for argparse."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}, expected seconds of at least 0")
    return seconds


def load_dialect(name_or_file: str) -> Dialect:
    """Return a dialect by its name, or from a grammar file, whose dialect is then registered in this process.

    A known name is never read as a file: write `./npr.lark` or `./npr` for a file.

    Raises:
        GrammarError: There is no such dialect, or the file holds none.
    """
    from sgl_apr.formats.dialects import Dialect, dialect, dialect_names, register_dialect

    is_file = name_or_file.endswith(".lark") or os.sep in name_or_file
    if not is_file or name_or_file in dialect_names():
        try:
            return dialect(name_or_file)
        except GrammarError as error:
            raise GrammarError(f"{error}, or a .lark file") from None
    loaded = Dialect.from_file(name_or_file)
    register_dialect(loaded)
    return loaded


def load_dialects(files: Sequence[str]) -> None:
    """Register the dialects of some grammar files in this process."""
    for file in files:
        load_dialect(file)


def add_api_key(parser: argparse.ArgumentParser) -> None:
    """Add `--api-key`, whose default is in the environment."""
    parser.add_argument(
        "--api-key",
        default=os.environ.get("SGL_APR_API_KEY"),
        help="key of the server (default: $SGL_APR_API_KEY)",
    )


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of commands that read finished traces."""
    parser.add_argument(
        "--dialect",
        metavar="NAME_OR_FILE",
        help="dialect of the traces, or a .lark file (default: recognized by the tags)",
    )
    parser.add_argument("--key", help="key of the text in an object of a .jsonl file")
    parser.add_argument("--jobs", type=parse_count, help="processes (default: one per core)")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train sft` and `train grpo`."""
    parser.add_argument(
        "config",
        type=Path,
        help="a TOML file: see configs/, and config.py and grpo_config.py in sgl_apr/training",
    )
    parser.add_argument(
        "--dialect",
        action="append",
        default=[],
        metavar="FILE",
        help="a .lark file, whose name the configuration can then use as its dialect; can be repeated",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an entry in TOML that replaces one of the file, such as steps.seed=1; can be repeated",
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="a directory for log, checkpoints and model"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
