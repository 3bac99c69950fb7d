"""The error of a server that does not answer like SGLang."""

from __future__ import annotations

from sgl_apr.errors import EngineError


def unexpected(name: str, field: str, found: str, expected: str) -> EngineError:
    """Return the error of a response in which something is not as SGLang sends it."""
    return EngineError(
        f"{name} does not answer like an SGLang server: {field} is {found}, expected {expected}"
    )
