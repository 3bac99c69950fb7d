"""The exceptions that callers handle. Modules with an error of their own derive it from one of these.

AprError
├── GrammarError          a grammar file, or a mask requested from it, is not usable
├── TraceError            a text does not follow its dialect (line, column, found, expected)
├── ConversionError       the target dialect cannot express a trajectory
├── BudgetExceeded        a budget is impossible, or ran out where nothing valid could be closed
├── LaunchError           a server could not be started
├── UnsupportedEngine     the engine or its model lacks a requested feature
├── KvJoinUnavailable     branches cannot be joined in the KV cache
├── SharedViewUnsupported a structure cannot express what workers of a group saw of one another
├── CodeForbidden         a method runs model-written programs, and this was not allowed
├── SandboxUnavailable    this machine cannot isolate model-written programs
├── MissingExtra          an optional dependency is not installed
└── EngineError           the engine failed during a request
    ├── EngineTimeout     the engine did not respond in time
    └── BranchFailed      one branch failed, and the trajectory with it
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from typing import Any


class AprError(Exception):
    """Base class of every exception of this package."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return what a message about an unknown name proposes; empty if no known name is close.

    Examples:
        >>> did_you_mean("budgett", ["budget", "mode"])
        "did you mean 'budget'?"
    """
    if not isinstance(name, str) or len(name) > 40:  # the comparison takes quadratic time
        return ""
    close = get_close_matches(name, list(known), 1, 0.7)
    return f"did you mean {close[0]!r}?" if close else ""


class GrammarError(AprError):
    """A grammar file, or a mask requested from it, is not usable."""


class TraceError(AprError):
    """A text does not follow its dialect, or JSON is not that of a trajectory.

    Attributes:
        line: Line of the error, counted from 1.
        column: Column of the error, counted from 1.
        found: The offending piece of text; empty at the end of the text.
        expected: What the grammar would have accepted there.
        place: In parsed JSON, which has no lines: where the wrong value stands, for example `spans[3].token_ids[0]`.
            `found` then describes the value.
    """

    def __init__(
        self, line: int, column: int, found: str, expected: Sequence[str], *, place: str = ""
    ) -> None:
        self.line, self.column, self.found, self.expected = line, column, found, tuple(expected)
        self.place = place
        accepted = " or ".join(self.expected)
        what = f"found {found!r}" if found else "the text ends"
        super().__init__(
            f"{place}: expected {accepted}, found {found}"
            if place
            else f"line {line}, column {column}: {what}, expected {accepted}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickling: an exception is otherwise made again from its message alone."""
        make = partial(type(self), place=self.place)
        return make, (self.line, self.column, self.found, self.expected)


class ConversionError(AprError):
    """The target dialect cannot express something that the trajectory holds."""


class BudgetExceeded(AprError):
    """A budget is impossible, or ran out where no well-formed reply could be completed."""


class LaunchError(AprError):
    """A server could not be started. The message gives the reason in one line."""


class UnsupportedEngine(AprError):
    """The engine or its model does not support the request."""


class KvJoinUnavailable(AprError):
    """Branches cannot be joined in the KV cache here."""


class SharedViewUnsupported(AprError):
    """A structure cannot express that workers of a group saw one another's tokens as they were written."""


class CodeForbidden(AprError):
    """A method runs model-written programs, and the caller has not allowed it."""


class SandboxUnavailable(AprError):
    """This machine cannot isolate model-written programs, so they are not run."""


class McpError(AprError):
    """A server of the Model Context Protocol failed: it did not start, ended, or sent something that is not valid."""


class MissingExtra(AprError):
    """An optional dependency is not installed. The message names the extra that installs it."""


class EngineError(AprError):
    """The engine failed: it was unreachable, died, or responded with an error.

    Attributes:
        status: The HTTP status of the response, if there was one.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(message)


class EngineTimeout(EngineError):
    """The engine did not respond in time."""


class BranchFailed(EngineError):
    """A branch failed. The cause is chained.

    Attributes:
        path: The branch, as (block, branch number, ...).
    """

    def __init__(self, message: str, path: Sequence[int] = (), status: int | None = None) -> None:
        self.path = tuple(path)
        super().__init__(message, status)


def require_extra(module: str, extra: str, message: str) -> None:
    """Check that the module of an optional dependency is installed, without importing it.

    Examples:
        >>> require_extra("no_such_module", "plot", "plots need matplotlib")
        Traceback (most recent call last):
        sgl_apr.errors.MissingExtra: plots need matplotlib: pip install 'matplotlib>=3.8' (the extra plot)

    Args:
        module: Name of the module.
        extra: The extra of this package that installs it.
        message: What needs which package.

    Raises:
        MissingExtra: If it is not installed.
    """
    if find_spec(module) is None:
        packages = " ".join(f"'{name}'" for name in requirements_of(extra))
        raise MissingExtra(f"{message}: pip install {packages} (the extra {extra})")


def requirements_of(extra: str | None) -> list[str]:
    """Return the packages of an extra with their versions, or those that are always needed.

    Examples:
        >>> requirements_of("mcts")
        ['treequest==0.3.3']
    """
    try:
        lines = [line.partition(";") for line in requires("sgl-apr") or ()]
    except PackageNotFoundError:  # a copy of the source that was not installed
        lines = []
    marker = "" if extra is None else f"extra == '{extra}'"
    return [name.strip() for name, _, condition in lines if condition.strip().replace('"', "'") == marker]
