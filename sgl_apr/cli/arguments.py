"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgl_apr.errors import AprError
from sgl_apr.runtime.budget import Budget

ALLOW_CODE_HELP = "let the method recursive run Python that the model writes, in a sandbox"


def parse_budget(text: str) -> Budget:
    """Parse a budget such as `tokens=2000,width=4` for argparse."""
    try:
        return Budget.parse(text)
    except AprError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of commands that read finished traces."""
    parser.add_argument("--dialect", help="dialect of the traces (default: recognized by the tags)")
    parser.add_argument("--key", help="key of the text in an object of a .jsonl file")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train sft` and `train grpo`."""
    parser.add_argument("config", type=Path, help="a TOML file: see configs/ and sgl_apr/training/config.py")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="a directory for log, checkpoints and model"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
