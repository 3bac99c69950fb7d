"""The options --model and --url of the examples: which server they use."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sgl_apr as apr
from sgl_apr.training.models import locate_model, smollm2


def example_parser(description: str | None, model: str) -> argparse.ArgumentParser:
    """A parser with --model, which serves a checkpoint while the example runs, and --url, which uses a running server."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--model", default=model, help="builtin, smollm2, a directory or a hub id (default: %(default)s)"
    )
    choice.add_argument("--url", help="the address of a running server")
    return parser


@contextmanager
def served(options: argparse.Namespace, **flags: Any) -> Iterator[str]:
    """The address of the server: the one at --url, or one for --model with these flags of `apr.Server`."""
    if options.url:
        yield options.url
        return
    model = smollm2() if options.model == "smollm2" else locate_model(options.model)
    with apr.Server(model, **flags) as server:
        yield server.url
