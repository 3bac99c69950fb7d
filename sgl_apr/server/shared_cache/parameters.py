"""What a request says about its group: the custom parameter `GROUP_PARAM`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sgl_apr.engine.sglang_names import GROUP_PARAM
from sgl_apr.errors import AprError
from sgl_apr.trajectory.worker_groups import GroupKind

MAX_WORKERS = 64
MAX_STEP_END = 64  # characters

_FIELDS = {"kind", "worker", "workers", "prompt_tokens"}
_KIND_FIELDS: dict[str, set[str]] = {"group_think": {"position_range"}, "hogwild": {"step_end"}}


class GroupError(AprError):
    """A request does not say correctly of which group it is."""


@dataclass(frozen=True, slots=True)
class GroupParams:
    """One worker of a group.

    Attributes:
        kind: How the workers see each other.
        worker: The number of this worker, from 0.
        workers: Number of workers.
        prompt_tokens: Tokens of the prompt that all workers have in common. What follows is the worker's header.
        position_range: Positions of each worker, for Group Think.
        step_end: Text that ends a step of Hogwild!, or None if no step ends.
        name: The name of the group. The server makes it, so that nobody can name the group of another client.
    """

    kind: GroupKind
    worker: int
    workers: int
    prompt_tokens: int
    position_range: int = 0
    step_end: str | None = None
    name: str = ""

    @property
    def group(self) -> tuple[object, ...]:
        """What all workers of a group have in common."""
        return (
            self.kind,
            self.workers,
            self.prompt_tokens,
            self.position_range,
            self.step_end,
            self.name,
        )

    @property
    def first_position(self) -> int:
        """The position of the worker's first own token, as its keys are cached."""
        return self.prompt_tokens + self.worker * self.position_range


def has_group(params: Any) -> bool:
    """Return whether `custom_params` of a request name a group."""
    return isinstance(params, dict) and GROUP_PARAM in params


def parse_group(params: Mapping[str, Any]) -> GroupParams:
    """Parse the group of a request.

    Args:
        params: `custom_params` of the request, for which `has_group` is true.

    Raises:
        GroupError: They are not valid.
    """
    value = params[GROUP_PARAM]
    if not isinstance(value, dict):
        raise GroupError(f"{GROUP_PARAM} is {type(value).__name__}, expected an object")
    kind: Any = value.get("kind")
    if kind not in get_args(GroupKind):
        raise GroupError(f"kind is {str(kind)[:40]!r}, expected one of {', '.join(get_args(GroupKind))}")
    if unknown := set(value) - _FIELDS - _KIND_FIELDS[kind] - {"name"}:
        raise GroupError(f"{sorted(map(str, unknown))[0][:40]!r} is no field of a group of kind {kind}")
    workers = _integer(value, "workers", 1, MAX_WORKERS)
    step_end = value.get("step_end")
    if step_end is not None and not (isinstance(step_end, str) and 0 < len(step_end) <= MAX_STEP_END):
        raise GroupError(f"step_end: expected null or a text of 1 to {MAX_STEP_END} characters")
    name = value.get("name", "")
    if not isinstance(name, str):
        raise GroupError(f"name is {type(name).__name__}, expected text")
    return GroupParams(
        kind=kind,
        worker=_integer(value, "worker", 0, workers - 1),
        workers=workers,
        prompt_tokens=_integer(value, "prompt_tokens", 1),
        position_range=_integer(value, "position_range", 1) if kind == "group_think" else 0,
        step_end=step_end,
        name=name,
    )


def check_group(workers: Sequence[GroupParams]) -> None:
    """Check that requests are the workers of one group, in order.

    Raises:
        GroupError: They are not.
    """
    first = workers[0]
    for number, worker in enumerate(workers):
        if worker.group != first.group:
            raise GroupError(f"worker {number} has another group than worker 0: expected the same fields")
        if worker.worker != number:
            raise GroupError(
                f"the request at place {number} is worker {worker.worker}, expected worker {number}"
            )
    if len(workers) != first.workers:
        raise GroupError(
            f"the batch has {len(workers)} requests, expected one for each of {first.workers} workers"
        )


def _integer(value: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int:
    number = value.get(name)
    if type(number) is not int or number < low or (high is not None and number > high):
        expected = f"an integer from {low} to {high}" if high is not None else f"an integer of at least {low}"
        raise GroupError(f"{name} is {str(number)[:40]!r}, expected {expected}")
    return number
