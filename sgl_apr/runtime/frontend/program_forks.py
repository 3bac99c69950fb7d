"""Forks and joins of `@sgl.function` programs: the shared prefix is committed, and no error is lost.

In SGLang 0.5.23, `fork` looks at the program's text without waiting for what was added last. A program that forks before
its first generation then commits nothing, and every child prefills the text. Children of a program that has failed
continue without what it lacks, and `join` leaves out children that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.lang.interpreter import ProgramStateGroup, StreamExecutor
from sglang.lang.ir import SglCommitLazy, SglGen


@dataclass(frozen=True)
class ProgramFailure:
    """The error of another program, passed in the `dtype` of a gen. Executing it raises the error.

    Attributes:
        error: The error of a program that this one continues, or that it has joined.
    """

    error: BaseException


def patch_forks() -> None:
    """Patch forks and joins, for backends with a method `prepare_fork`. Others keep SGLang's."""
    stock_fork, stock_join = StreamExecutor.fork, ProgramStateGroup.join

    def fork(self: Any, size: int = 1, position_ids_offset: list[int] | None = None) -> Any:
        return (
            _fork(self, size, position_ids_offset, stock_fork)
            if hasattr(self.backend, "prepare_fork")
            else stock_fork(self, size, position_ids_offset)
        )

    def join(self: Any, mode: str = "gather_variable") -> None:
        parent = self.src_state.stream_executor
        if not hasattr(parent.backend, "prepare_fork"):
            stock_join(self, mode)
            return
        children = [state.stream_executor for state in self.states]
        for child in children:
            child.sync()
        if error := next((child.error_ for child in children if child.error_ is not None), None):
            fail(parent, error)
            parent.sync()
        elif mode == "gather_variable":
            _gather(parent, children)
        stock_join(self, mode)

    StreamExecutor.fork, ProgramStateGroup.join = fork, join


def _fork(
    parent: Any, size: int, position_ids_offset: list[int] | None, stock_fork: Callable[..., Any]
) -> list[Any]:
    """Fork a program after its complete text is committed. A failed program hands its error to its children."""
    parent.sync()
    parent.backend.prepare_fork(parent)
    if size == 1 and parent.text_:  # SGLang commits only before a fork into several
        parent.submit(SglCommitLazy())
    children: list[Any] = stock_fork(parent, size, position_ids_offset)
    for child in children:
        child.meta_info = dict(parent.meta_info)
        child.apr_program_thread = getattr(parent, "apr_program_thread", None)
        if parent.error_ is not None:
            fail(child, parent.error_)
    return children


def _gather(parent: Any, children: Sequence[Any]) -> None:
    """Give a program the variables that only its children have, as lists, with their meta information.

    SGLang appends value by value, so that a program that streams is read with lists that are too short.
    """
    for name in {
        name: None for child in children for name in child.variables if name not in parent.variables
    }:
        having = [child for child in children if name in child.variables]
        parent.meta_info[name] = [child.meta_info.get(name) for child in having]
        parent.variables[name] = [child.variables[name] for child in having]


def fail(executor: Any, error: BaseException) -> None:
    """Let a program fail with an error, after what was submitted to it before."""
    executor.submit(SglGen("__apr_failure__", dtype=ProgramFailure(error)))
