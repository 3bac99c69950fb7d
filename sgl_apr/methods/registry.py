"""The methods by name, and the result that all of them return."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import Any, get_type_hints

from sgl_apr.errors import AprError
from sgl_apr.runtime.option_checks import check_function, check_options
from sgl_apr.runtime.value_checks import check_type, shorten, unknown_name
from sgl_apr.trajectory.metrics import Metrics
from sgl_apr.trajectory.trajectory import Trajectory

_FIXED = (
    "pro", "sequential", "self_consistency", "best_of_n", "value_guided", "deepconf", "pacore", "rsa",
    "skeleton_of_thought", "tree_of_thoughts", "spex", "graph_of_thoughts", "mcts", "group_think", "hogwild", "recursive",
)  # fmt: skip
_ADAPTIVE = ("parathinker", "threadweaver", "multiverse", "npr", "parallel_r1", "apr")
METHOD_MODULES = {name: name for name in _FIXED} | dict.fromkeys(_ADAPTIVE, "native_formats")
METHOD_NAMES = tuple(METHOD_MODULES)


@dataclass(frozen=True)
class MethodResult:
    """The answer of a method, and how it was found.

    Attributes:
        method: The name of the method.
        answer: The answer as the task reads it, empty if there is none.
        trajectory: Everything that was decoded.
        score: What the method chose the answer by (share of votes, value, verifier's score); None if it did not choose.
        label: What exactly was run: "exact", or how it differs from the published method.
    """

    method: str
    answer: str
    trajectory: Trajectory
    score: float | None = None
    label: str = "exact"

    @property
    def metrics(self) -> Metrics:
        """Tokens, critical path, and the work of the engine."""
        return self.trajectory.metrics()


Method = Callable[..., Awaitable[MethodResult]]


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        AprError: If there is none; the message lists all names.
    """
    if name not in METHOD_MODULES:
        raise AprError(unknown_name(name, METHOD_MODULES, "method "))
    module: Mapping[str, Any] = vars(import_module(f"sgl_apr.methods.{METHOD_MODULES[name]}"))
    run: Method = module[name]
    return run


def check_arguments(name: str, task: Any, options: Mapping[str, Any]) -> None:
    """Check the arguments of a method before it runs.

    Args:
        name: The name of the method.
        task: What makes the task for an engine.
        options: The options of the method, and `on_event`.

    Raises:
        AprError: There is no such method, or an option has an unknown name, a wrong type, or a value that is not
            possible.
    """
    from sgl_apr.methods.method_options import METHOD_OPTION_NAMES, check_method_options

    run = method(name)
    if not callable(task):
        raise AprError(
            f"task={shorten(task)}, expected a subclass of Task, or a function that makes one for an engine"
        )
    others = {key: value for key, value in options.items() if key != "on_event"}
    if (on_event := options.get("on_event")) is not None:
        check_function("on_event", on_event)
    if name in _ADAPTIVE:
        check_options(others)
        return
    own = {p.name: p.default for p in signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for key, value in others.items():
        default = own.get(key)
        if key == "exact" and key in own and value is not None:  # True, False, or what the engine can
            check_type(key, value, bool)
        elif isinstance(default, bool | int | float) and value is not None:
            check_type(key, value, type(default))
        elif key in own:
            _check_annotation(run, key, value)
        elif (
            key not in own
            and key not in METHOD_OPTION_NAMES
            and get_close_matches(str(key)[:40], own, 1, 0.7)
        ):
            raise AprError(unknown_name(key, own, "option "))
    check_method_options(
        {key: v for key, v in others.items() if key not in own or key in METHOD_OPTION_NAMES}
    )


def _check_annotation(run: Method, name: str, value: Any) -> None:
    """Check the value of an option against the annotation of its parameter.

    Raises:
        AprError: It has another type.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    adapter = TypeAdapter(get_type_hints(run)[name], config=ConfigDict(arbitrary_types_allowed=True))
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        expected = {str(detail["msg"]).removeprefix("Input should be ") for detail in error.errors()}
        raise AprError(f"{name}={shorten(value)}, expected {' or '.join(sorted(expected))}") from None
