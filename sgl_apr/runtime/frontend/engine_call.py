"""What `apr.reason` and `apr.solve` hand to the backend of a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from sgl_apr.engine.base import Engine
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.events import OnEvent
from sgl_apr.runtime.options import ReasonOptions, make_options
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory


class EngineResult(Protocol):
    """What an `EngineCall` returns."""

    @property
    def answer(self) -> str:
        """The value of the program's variable."""
        ...

    @property
    def trajectory(self) -> Trajectory:
        """The trajectory that led to the answer."""
        ...


@runtime_checkable
class EngineCall(Protocol):
    """An expression that runs on the engine of a program, such as `apr.solve`. It is passed in `dtype`."""

    async def run(self, engine: Engine) -> EngineResult:
        """Run the expression and return its result."""
        ...


@dataclass(frozen=True)
class Reason:
    """An `apr.reason` expression. It is passed in `dtype`. Other backends than `apr.Endpoint` reject it.

    Attributes:
        name: The program's variable.
        dialect: The dialect, or None for the model's own.
        options: Options of `apr.reason`.
        on_event: Receives the events.
    """

    name: str
    dialect: Dialect | str | None
    options: Mapping[str, Any]
    on_event: OnEvent | None = None

    def resolve_options(self, tokenizer: Tokenizer, sampling: Mapping[str, Any]) -> ReasonOptions:
        """Return the options for a model.

        Args:
            tokenizer: The model's tokenizer.
            sampling: The program's sampling parameters. Those of the expression override them.
        """
        return make_options(self.dialect, tokenizer, **{**sampling, **self.options})

    def __str__(self) -> str:
        return f"apr.reason({self.name!r}), which needs the backend apr.Endpoint"

    __repr__ = __str__
