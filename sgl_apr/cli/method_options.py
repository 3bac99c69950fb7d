"""Options of methods on the command line: `--option NAME=VALUE`, or `METHOD.NAME=VALUE` for one of several methods."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.errors import AprError

# What has an argument of its own.
OWN_ARGUMENTS = {
    "budget": "--budget",
    "temperature": "--temperature",
    "seed": "--seed",
    "allow_code": "--allow-code",
}


@dataclass(frozen=True, slots=True)
class MethodOption:
    """An option of a method.

    Attributes:
        method: The method, empty for every one.
        name: The name of the option.
        value: JSON, or else the text.
    """

    method: str
    name: str
    value: Any


def parse_method_option(text: str) -> MethodOption:
    """Parse an option for argparse.

    Examples:
        >>> parse_method_option("recursive.part_tokens=512")
        MethodOption(method='recursive', name='part_tokens', value=512)
        >>> parse_method_option("stop=beta")
        MethodOption(method='', name='stop', value='beta')
    """
    key, separator, written = text.partition("=")
    method, _, name = key.strip().rpartition(".")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=VALUE or METHOD.NAME=VALUE")
    if name in OWN_ARGUMENTS:
        raise argparse.ArgumentTypeError(f"{text!r}, expected {OWN_ARGUMENTS[name]} for that")
    try:
        value = json.loads(written)
    except ValueError:
        value = written
    return MethodOption(method, name, value)


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Add `--option` to a parser."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=parse_method_option,
        metavar="[METHOD.]NAME=VALUE",
        help="an option of a method, in JSON or as text, such as recursive.part_tokens=512 or stop=beta; may be given several times",
    )


def check_methods(given: Sequence[MethodOption], methods: Sequence[str]) -> None:
    """Check that all options are for methods that run.

    Raises:
        AprError: One is not.
    """
    for option in given:
        if option.method and option.method not in methods:
            raise AprError(
                f"--option {option.method}.{option.name}: expected an option of {', '.join(methods)}"
            )


def options_of(method: str, given: Sequence[MethodOption]) -> dict[str, Any]:
    """The options of one method by name, of those that were given."""
    return {option.name: option.value for option in given if option.method in ("", method)}
