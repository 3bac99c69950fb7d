"""`apr.solve`, the expression of `@sgl.function` programs that lets a method solve a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sgl_apr.runtime.events import OnEvent

if TYPE_CHECKING:
    from sglang.lang.ir import SglGen

    from sgl_apr.engine.base import Engine
    from sgl_apr.methods.registry import MethodResult
    from sgl_apr.methods.task import Task


@dataclass(frozen=True)
class Solve:
    """The arguments of an `apr.solve` expression; they reach the backend as those of `apr.reason` do."""

    name: str
    problem: Any
    method: str
    task: Callable[[Engine], Task[Any]]
    options: Mapping[str, Any]
    on_event: OnEvent | None = None

    async def run(self, engine: Engine) -> MethodResult:
        """Run the method on the problem."""
        from sgl_apr.methods.registry import method

        options = {"on_event": self.on_event, **self.options}
        return await method(self.method)(engine, self.problem, task=self.task(engine), **options)

    def __str__(self) -> str:
        return f"apr.solve({self.name!r}), which needs the backend apr.Endpoint"

    __repr__ = __str__


def solve(
    name: str,
    problem: Any,
    *,
    method: str,
    task: Callable[[Engine], Task[Any]],
    on_event: OnEvent | None = None,
    **options: Any,
) -> SglGen:
    """Let a method of `sgl_apr.methods` solve a problem, and append its answer to the program.

    The method sends prompts of its own, and does not see the text of the program.

    Args:
        name: `state[name]` is the answer; `state.get_meta_info(name)` has the `MethodResult` and the `Trajectory`.
        problem: A problem of the task.
        method: The name of a method.
        task: Makes the task for an engine; usually a subclass of `Task`.
        on_event: Receives the events of the run.
        options: Those of the method. It samples as its paper says, not with the program's sampling parameters.

    Raises:
        AprError: There is no such method, or an option is wrong. This is raised here, where the expression is built.

    Examples:
        >>> s += apr.solve("answer", "Why?", method="self_consistency", task=QuestionTask)  # doctest: +SKIP
    """
    from sglang.lang.ir import SglGen

    from sgl_apr.methods.registry import check_arguments
    from sgl_apr.runtime.frontend.expressions import check_variable
    from sgl_apr.runtime.frontend.sglang_patch import patch_frontend

    check_variable(name)
    check_arguments(method, task, {"on_event": on_event, **options})
    patch_frontend()  # so that another backend raises what is wrong
    return SglGen(name, dtype=Solve(name, problem, method, task, options, on_event))
