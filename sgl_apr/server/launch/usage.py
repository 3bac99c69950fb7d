"""The error for a wrong command line, and the parser that raises it."""

from __future__ import annotations

import argparse
from typing import NoReturn

from sgl_apr.errors import LaunchError


class UsageError(LaunchError):
    """The command line is wrong."""


class UsageParser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError`, where argparse prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)
