"""`apr.reason`, the expression of `@sgl.function` programs that lets a model reason. `apr.Endpoint` runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.arguments import ReasonArguments
from sgl_apr.runtime.events import OnEvent
from sgl_apr.runtime.frontend.engine_call import Reason
from sgl_apr.runtime.frontend.sglang_patch import patch_frontend
from sgl_apr.runtime.options import check_call
from sgl_apr.runtime.value_checks import shorten

if TYPE_CHECKING:
    from sglang.lang.ir import SglGen


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
