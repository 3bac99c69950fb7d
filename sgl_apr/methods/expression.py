"""apr.solve: an expression that lets a method solve a problem."""

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
    """What an `apr.solve` expression asks for; it travels as `Reason` does."""

    name: str
    problem: Any
    method: str
    task: Callable[[Engine], Task[Any, Any]]
    options: Mapping[str, Any]
    on_event: OnEvent | None = None

    async def run(self, engine: Engine) -> MethodResult:
        """The method on the problem."""
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
    task: Callable[[Engine], Task[Any, Any]],
    on_event: OnEvent | None = None,
    **options: Any,
) -> SglGen:
    """Let a method of `sgl_apr.methods` solve a problem of a task; `state[name]` is its answer, which the program reads.

    The method asks its own prompts, and sees nothing of the program. `state.get_meta_info(name)` has its `Result`,
    and the `Trajectory`. Options are those of the method, which samples as its paper says, not as the program does.

    >>> s += apr.solve("answer", "Why?", method="self_consistency", task=QuestionTask)  # doctest: +SKIP
    """
    from sglang.lang.ir import SglGen

    from sgl_apr.methods.registry import method as known

    known(method)
    return SglGen(name, dtype=Solve(name, problem, method, task, options, on_event))
