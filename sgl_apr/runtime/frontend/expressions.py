"""Expressions for `@sgl.function` programs: `apr.reason`, and the interface of `apr.solve`. `apr.Endpoint` runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Unpack, runtime_checkable

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.arguments import ReasonArguments
from sgl_apr.runtime.events import OnEvent
from sgl_apr.runtime.options import ReasonOptions, check_call, make_options
from sgl_apr.runtime.value_checks import shorten
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory

if TYPE_CHECKING:
    from sglang.lang.ir import SglGen


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


def reason(
    name: str,
    dialect: Dialect | str | None = None,
    *,
    on_event: OnEvent | None = None,
    **options: Unpack[ReasonArguments],
) -> SglGen:
    """Let the model reason, forking and joining as it decides.

    The variable `state[name]` is the answer, the text after the last join. `state.text()` has the complete trace, and
    `state.get_meta_info(name)["trajectory"]` the `Trajectory`.

    Args:
        name: The program's variable.
        dialect: The dialect. None takes the one whose tags the model's tokenizer has, else "threadweaver".
        on_event: Receives the events as they happen, in a thread of the backend.
        **options: Fields of `ReasonOptions` (budget, mode, policy, ...) and sampling parameters of SGLang
            (temperature, top_p, ...), which override those of the program.

    Raises:
        AprError: An option has an unknown name, a wrong type or an impossible value. This is raised here, where the
            expression is built. What is not possible with the dialect of the model is raised where the program reads
            the variable, if no dialect is named.

    Examples:
        >>> s += sgl.assistant(apr.reason("answer", dialect="threadweaver", budget=apr.Budget(width=4)))  # doctest: +SKIP
    """
    from sglang.lang.ir import SglGen

    from sgl_apr.runtime.frontend.sglang_patch import patch_frontend

    check_variable(name)
    check_call(dialect, options, on_event)
    patch_frontend()  # so that another backend raises what is wrong
    return SglGen(name, dtype=Reason(name, dialect, dict(options), on_event))


def check_variable(name: Any) -> None:
    """Check the name of a program's variable.

    Raises:
        AprError: It is not text, or empty.
    """
    if not (isinstance(name, str) and name):
        raise AprError(f'the name of the variable is {shorten(name)}, expected text such as "answer"')
