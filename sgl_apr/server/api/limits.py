"""The operator's limits: how large one trajectory may be, and how many may run and wait."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sgl_apr.errors import BudgetExceeded
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.value_checks import shorten

# By flag: the field of `RequestLimits`, the lowest value, and the help text.
LIMIT_FLAGS: Mapping[str, tuple[str, int | float, str]] = {
    "--apr-max-width": ("width", 2, "branches of a fork"),
    "--apr-max-depth": ("depth", 1, "nesting depth of forks"),
    "--apr-max-tokens": ("tokens", 1, "tokens of one trajectory"),
    "--apr-max-seconds": ("seconds", 0.001, "seconds of one trajectory"),
    "--apr-max-tool-calls": ("tool_calls", 0, "calls of tools of one trajectory"),
    "--apr-max-tool-seconds": ("tool_seconds", 0.001, "seconds of one call of a tool that this server runs"),
    "--apr-max-choices": ("choices", 1, "choices of one request, its field `n` (default: 16)"),
    "--apr-max-concurrent": (
        "concurrent", 1, "trajectories that run at once; further ones wait in a queue (default: 256)",
    ),
    "--apr-max-queued": (
        "queued", 0, "trajectories that wait; further ones are refused with status 503 (default: 1024)",
    ),
    "--apr-queue-timeout": (
        "queue_timeout", 0.001, "seconds that a trajectory waits before it is refused with status 503 (default: 60)",
    ),
    "--apr-turn-memory": (
        "turn_memory", 0,
        "MiB of memory for the token ids of replies, which the next turn of a conversation finds in the KV cache; 0 "
        "remembers none (default: 64)",
    ),
    "--apr-tool-wait": (
        "tool_wait", 0.001, "seconds that a trajectory waits for the results of tools that its client runs (default: 300)",
    ),
    "--apr-max-waiting": (
        "max_waiting", 0,
        "trajectories that wait for their clients; more end the oldest, and 0 refuses such tools (default: 1024)",
    ),
    "--apr-max-waiting-tokens": (
        "max_waiting_tokens", 1, "tokens that these have in all; more end the oldest (default: 2000000)",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The flags `--apr-max-...`, `--apr-queue-timeout` and `--apr-tool-wait` of `sgl-apr serve`.

    A request may set lower limits, never higher ones. If it does not set a limit, it gets the operator's limit or the
    default, whichever is lower.

    Attributes:
        width: Branches per fork. None: not limited by the operator; the same for the next five.
        depth: Nesting depth of forks.
        tokens: Tokens of one trajectory.
        seconds: Seconds of one trajectory.
        tool_calls: Calls of tools of one trajectory.
        tool_seconds: Seconds of one call of a tool that the server runs.
        choices: Choices of one request, each of which is a trajectory.
        concurrent: Trajectories that run at once. Further ones wait.
        queued: Trajectories that wait. The server refuses further ones.
        queue_timeout: Seconds that a trajectory waits before the server refuses it.
        turn_memory: MiB for the token ids of replies, for the next turns of their conversations. 0 remembers none.
        tool_wait: Seconds that a trajectory waits for the results of tools that its client runs.
        max_waiting: Trajectories that wait for such results. More end the oldest. 0 refuses such tools.
        max_waiting_tokens: Tokens of all trajectories that wait for such results. More end the oldest.
    """

    width: int | None = None
    depth: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    tool_calls: int | None = None
    tool_seconds: float | None = None
    choices: int = 16
    concurrent: int = 256
    queued: int = 1024
    queue_timeout: float = 60.0
    turn_memory: int = 64
    tool_wait: float = 300.0
    max_waiting: int = 1024
    max_waiting_tokens: int = 2_000_000

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
        budget = self._checked(requested)
        if self.width is not None:
            budget.setdefault("width", min(self.width, dialect.width))
        token_limits = (Budget().tokens, context_left, *([] if self.tokens is None else [self.tokens]))
        budget.setdefault("tokens", max(1, min(token_limits)))
        return Budget(**budget)

    def fork_budget(self, requested: Mapping[str, Any]) -> Budget:
        """Return the budget of a fork of a context, whose branches are the tasks of its request.

        Args:
            requested: The fields of `Budget` that the request sets.

        Raises:
            BudgetExceeded: The request sets a limit above the operator's.
        """
        budget = self._checked(requested)
        budget.setdefault("tokens", min(filter(None, (Budget().tokens, self.tokens))))
        return Budget(**budget)

    def _checked(self, requested: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `Budget` that a request sets, and the operator's limits of what it does not."""
        for name in ("width", "depth", "tokens", "seconds", "tool_calls", "tool_seconds"):
            limit, value = getattr(self, name), requested.get(name)
            if limit is not None and value is not None and value > limit:
                raise BudgetExceeded(
                    f"budget {name}={value} is more than this server allows: --apr-max-{name.replace('_', '-')} {limit}"
                )
        budget = dict(requested)
        if self.seconds is not None:
            budget.setdefault("seconds", self.seconds)
        if self.tool_calls is not None:
            budget.setdefault("tool_calls", self.tool_calls)
        if self.tool_seconds is not None:
            budget.setdefault("tool_seconds", min(self.tool_seconds, Budget().tool_seconds))
        return budget


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `LIMIT_FLAGS` to a parser. A flag that is not given leaves no attribute."""
    add_number_flags(parser, LIMIT_FLAGS)


def add_number_flags(
    parser: argparse.ArgumentParser, flags: Mapping[str, tuple[str, int | float, str]]
) -> None:
    """Add flags with a number to a parser. A flag that is not given leaves no attribute.

    Args:
        parser: The parser.
        flags: By flag: the name of the attribute, the lowest value, and the help text.
    """
    for flag, (field, minimum, text) in flags.items():
        parser.add_argument(
            flag,
            dest=field,
            type=bounded_number(minimum),
            default=argparse.SUPPRESS,
            metavar="S" if isinstance(minimum, float) else "N",
            help=text,
        )


def bounded_number(minimum: float) -> Callable[[str], float]:
    """Return a function that parses the number of a flag: a whole number if `minimum` is one."""

    def parse(text: str) -> float:
        kind = "a number" if isinstance(minimum, float) else "a whole number"
        try:
            value = type(minimum)(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{shorten(text)}, expected {kind}") from None
        if not minimum <= value < 2**63:  # also true for NaN
            raise argparse.ArgumentTypeError(f"{shorten(text)}, expected {kind} of at least {minimum:g}")
        return value

    return parse
