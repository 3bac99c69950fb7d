"""What an operator lets a trajectory ask for, and how many there may be at once; nothing is counted here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from sgl_apr.errors import AprError, BudgetExceeded
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.budget import Budget
from sgl_apr.server.launch.usage import UsageError

LOWEST: Mapping[str, int | float] = {"width": 2, "depth": 1, "tokens": 1, "seconds": 0.001, "concurrent": 1}


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The flags `--apr-max-...` of `sgl-apr serve`. A request may ask for less, never for more.

    width, depth, tokens, seconds: of the budget of one trajectory, None for no cap. A request that names no
        such limit gets the cap, or the default where that is less.
    concurrent: trajectories at once; one more is refused.
    """

    width: int | None = None
    depth: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    concurrent: int = 256

    def budget(self, asked: Mapping[str, Any], dialect: Dialect, room: int) -> Budget:
        """The budget that a request gets for the limits it names; raises `BudgetExceeded` over a cap.

        room: tokens that the model's context has behind the prompt. Where no tokens are asked for, a reply is
        to fit into it.
        """
        for name in ("width", "depth", "tokens", "seconds"):
            cap, value = getattr(self, name), asked.get(name)
            if cap is not None and value is not None and value > cap:
                raise BudgetExceeded(
                    f"budget {name}={value} is more than this server allows: --apr-max-{name} {cap}"
                )
        limits = dict(asked)
        if self.width is not None:
            limits.setdefault("width", min(self.width, dialect.width))
        if self.seconds is not None:
            limits.setdefault("seconds", self.seconds)
        usual = (Budget().tokens, room, *([] if self.tokens is None else [self.tokens]))
        limits.setdefault("tokens", max(1, min(usual)))
        return Budget(**limits)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def read_caps(argv: Sequence[str]) -> tuple[RequestLimits, list[str]]:
    """The caps of a command line, and the rest of it, for SGLang; raises `UsageError`."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, lowest in LOWEST.items():
        parser.add_argument(f"--apr-max-{name}", dest=name, type=type(lowest))
    found, rest = parser.parse_known_args(list(argv))
    for name, value in vars(found).items():
        if not value >= LOWEST[name]:
            raise UsageError(f"--apr-max-{name} {value}, expected at least {LOWEST[name]:g}")
    return RequestLimits(**vars(found)), rest


class ServerBusy(AprError):
    """As many trajectories run as the operator allows."""
