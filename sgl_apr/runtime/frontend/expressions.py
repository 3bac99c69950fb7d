"""`apr.reason` and `apr.solve`: expressions for `@sgl.function` programs; the backend that runs them is `apr.Endpoint`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sgl_apr.engine.base import Engine
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.events import OnEvent
from sgl_apr.runtime.options import ReasonOptions, make_options
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory

if TYPE_CHECKING:
    from sglang.lang.ir import SglGen


class EngineResult(Protocol):
    """What an `EngineCall` returns."""

    @property
    def answer(self) -> str:
        """What the program's variable gets."""
        ...

    @property
    def trajectory(self) -> Trajectory:
        """How the answer was found."""
        ...


@runtime_checkable
class EngineCall(Protocol):
    """An expression that runs over the engine of a program, such as `apr.solve`. It travels in `dtype`."""

    async def run(self, engine: Engine) -> EngineResult:
        """Run it."""
        ...


@dataclass(frozen=True)
class Reason:
    """What an `apr.reason` expression asks for. It travels in `dtype`, which any other backend refuses."""

    name: str
    dialect: Dialect | str | None
    options: Mapping[str, Any]
    on_event: OnEvent | None = None

    def plan(self, tokenizer: Tokenizer, sampling: Mapping[str, Any]) -> ReasonOptions:
        """The plan for a model with this tokenizer; its own sampling parameters win over these."""
        return make_options(self.dialect, tokenizer, **{**sampling, **self.options})

    def __str__(self) -> str:
        return f"apr.reason({self.name!r}), which needs the backend apr.Endpoint"

    __repr__ = __str__


def reason(
    name: str, dialect: Dialect | str | None = None, *, on_event: OnEvent | None = None, **options: Any
) -> SglGen:
    """Let the model think, forking and joining as it decides; `state[name]` is its answer.

    Without a `dialect` it is the one whose tags the model's tokenizer has, else "threadweaver". The answer
    is the text after the last join; `state.text()` holds the whole trace, and
    `state.get_meta_info(name)["trajectory"]` the `Trajectory`. Options are the fields of `Plan` (budget,
    mode, policy, ...), and are checked here: what the dialect does not allow raises at once. Any other is a
    sampling parameter of SGLang's (temperature, top_p, ...), over those of the program. `on_event` hears
    what happens as it happens, in a thread of the backend's.

    >>> s += sgl.assistant(apr.reason("answer", dialect="threadweaver", budget=apr.Budget(width=4)))  # doctest: +SKIP
    """
    from sglang.lang.ir import SglGen

    if dialect is not None:
        make_options(dialect, **options)
    return SglGen(name, dtype=Reason(name, dialect, options, on_event))
