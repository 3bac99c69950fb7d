"""Every error that sgl_apr raises on purpose; it does not decide when.

AprError
├── GrammarError          a grammar file or its lowering is not usable
├── TraceError            a text does not follow its dialect (line, column, found, expected)
├── ConversionError       a trajectory that another dialect cannot express
├── BudgetExceeded        a budget that cannot be met, or that ran out where nothing can be closed
├── LaunchError           a server could not be started
├── UnsupportedEngine     the engine or model lacks something that was asked for
├── KvJoinUnavailable     a KV join was asked for and cannot be done
├── CodeForbidden         a method runs programs that a model writes, and was not allowed to
├── SandboxUnavailable    such programs cannot be shut in on this machine
└── EngineError           the engine failed while it worked
    ├── EngineTimeout     it did not answer in time
    └── BranchFailed      one branch failed, and the trajectory with it
"""

from __future__ import annotations

from collections.abc import Sequence


class AprError(Exception):
    """Base of every error of this package."""


class GrammarError(AprError):
    """A grammar file, or what was asked of it, is not usable."""


class TraceError(AprError):
    """A text that does not follow its dialect.

    `line` and `column` count from 1; `found` is the offending piece (empty at the end of the text),
    `expected` what the grammar would have taken there.
    """

    def __init__(self, line: int, column: int, found: str, expected: Sequence[str]) -> None:
        self.line, self.column, self.found, self.expected = line, column, found, tuple(expected)
        what = f"found {found!r}" if found else "the text ends"
        super().__init__(f"line {line}, column {column}: {what}, expected {' or '.join(self.expected)}")


class ConversionError(AprError):
    """A trajectory holds what the dialect it is to be written in cannot express."""


class BudgetExceeded(AprError):
    """A budget is impossible, or it ran out where nothing well formed could be made."""


class LaunchError(AprError):
    """A server could not be started; the message says why in one line."""


class UnsupportedEngine(AprError):
    """The engine or its model cannot do what was asked."""


class KvJoinUnavailable(AprError):
    """Branches cannot be joined in the KV cache here."""


class CodeForbidden(AprError):
    """A method runs programs that a model writes, and nobody has said that it may."""


class SandboxUnavailable(AprError):
    """Programs that a model writes cannot be shut in on this machine; they are not run."""


class EngineError(AprError):
    """The engine failed: unreachable, died, or answered with an error. `status` is the HTTP status, if any."""

    def __init__(self, message: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(message)


class EngineTimeout(EngineError):
    """The engine did not answer in time."""


class BranchFailed(EngineError):
    """A branch failed; `path` says which (block, branch number, ...). The cause is chained."""

    def __init__(self, message: str, path: Sequence[int] = (), status: int | None = None) -> None:
        self.path = tuple(path)
        super().__init__(message, status)
