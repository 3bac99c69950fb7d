"""The error for a wrong command line."""

from __future__ import annotations

from sgl_apr.errors import LaunchError


class UsageError(LaunchError):
    """The command line is wrong."""
