"""Explains in one line that a package is not installed. It imports nothing but the standard library."""

from __future__ import annotations

import re

from sgl_apr.errors import requirements_of


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """Return what to install for an import that failed, or None if the module is one of this package.

    Examples:
        >>> explain_missing(ModuleNotFoundError(name="lark.exceptions"))
        "the package lark is not installed: pip install 'lark>=1.2'"
        >>> explain_missing(ModuleNotFoundError(name="torch"))
        "the package torch is not installed: pip install 'sglang==0.5.23'"
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "sgl_apr"):
        return None
    own = {re.split(r"[^\w-]", line)[0].replace("-", "_"): line for line in requirements_of(None)}
    requirement = own.get(package) or own.get("sglang") or "sglang"  # the others come with SGLang
    return f"the package {package} is not installed: pip install '{requirement}'"
