"""The operator's limits: how large one trajectory may be, and how many may run at once."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.errors import AprError, BudgetExceeded
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.budget import Budget
from sgl_apr.server.launch.usage import UsageError, UsageParser

MINIMUMS: Mapping[str, int | float] = {"width": 2, "depth": 1, "tokens": 1, "seconds": 0.001, "concurrent": 1}


class ServerBusy(AprError):
    """The server already runs as many trajectories as the operator allows."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The flags `--apr-max-...` of `sgl-apr serve`.

    A request may set lower limits, never higher ones. If it does not set a limit, it gets the operator's limit or the
    default, whichever is lower.

    Attributes:
        width: Branches per fork. None: not limited by the operator; the same for the next three.
        depth: Nesting depth of forks.
        tokens: Tokens of one trajectory.
        seconds: Seconds of one trajectory.
        concurrent: Trajectories that run at once. The server refuses further ones.
    """

    width: int | None = None
    depth: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    concurrent: int = 256

    def budget(self, requested: Mapping[str, Any], dialect: Dialect, context_left: int) -> Budget:
        """Return the budget of a request.

        Args:
            requested: The fields of `Budget` that the request sets.
            dialect: The dialect of the trajectory. It has a default width.
            context_left: Tokens that the model's context has left after the prompt. They bound the tokens of a
                request that does not set any.

        Raises:
            BudgetExceeded: The request sets a limit above the operator's.
        """
        for name in ("width", "depth", "tokens", "seconds"):
            limit, value = getattr(self, name), requested.get(name)
            if limit is not None and value is not None and value > limit:
                raise BudgetExceeded(
                    f"budget {name}={value} is more than this server allows: --apr-max-{name} {limit}"
                )
        budget = dict(requested)
        if self.width is not None:
            budget.setdefault("width", min(self.width, dialect.width))
        if self.seconds is not None:
            budget.setdefault("seconds", self.seconds)
        token_limits = (Budget().tokens, context_left, *([] if self.tokens is None else [self.tokens]))
        budget.setdefault("tokens", max(1, min(token_limits)))
        return Budget(**budget)


def parse_limit_arguments(argv: Sequence[str]) -> tuple[RequestLimits, list[str]]:
    """Parse the flags `--apr-max-...`.

    Returns:
        The limits, and the remaining arguments, which are SGLang's.

    Raises:
        UsageError: A value is missing, not a number, or too low.
    """
    parser = UsageParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, minimum in MINIMUMS.items():
        parser.add_argument(f"--apr-max-{name}", dest=name, type=type(minimum))
    limits, remaining = parser.parse_known_args(list(argv))
    for name, value in vars(limits).items():
        if not value >= MINIMUMS[name]:  # also true for NaN
            raise UsageError(f"--apr-max-{name} {value}, expected at least {MINIMUMS[name]:g}")
    return RequestLimits(**vars(limits)), remaining
