"""Tasks whose problems are the messages of a chat, by name.

A package declares its own as an entry point of the group `sgl_apr.chat_tasks`: a subclass of `SampledTask` that takes an engine, and
`chat`, which puts messages to the model.
"""

from __future__ import annotations

from typing import Any, Protocol

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.formats.entry_points import installed_entry_points, load_entry_point
from sgl_apr.methods.task import SampledTask
from sgl_apr.runtime.value_checks import unknown_name

ENTRY_POINT_GROUP = "sgl_apr.chat_tasks"
DEFAULT_CHAT_TASK = "question"


class Chat(Protocol):
    """Puts messages to a model."""

    @property
    def quoted(self) -> tuple[str, ...]:
        """What users and models have said in the text around a message. No control token is in it."""
        ...

    def turn(self, message: str, *, first: bool = True) -> str:
        """A user's message; `first` means that no reply comes before it."""
        ...


def chat_task_names() -> list[str]:
    """The names of all such tasks of installed packages, the default first."""
    names = {point.name for point in installed_entry_points(ENTRY_POINT_GROUP)}
    return sorted(names, key=lambda name: (name != DEFAULT_CHAT_TASK, name))


def chat_task(name: str, engine: Engine, chat: Chat) -> SampledTask[str]:
    """The task of that name.

    Args:
        name: The name.
        engine: Where the model decodes.
        chat: How messages are put to it.

    Raises:
        AprError: There is no such task, or its entry point names something else.
    """
    points = [point for point in installed_entry_points(ENTRY_POINT_GROUP) if point.name == name]
    if not points:
        raise AprError(unknown_name(name, chat_task_names(), "task "))
    kind: Any = load_entry_point(points[0], type, "a subclass of SampledTask")
    if not issubclass(kind, SampledTask):
        raise AprError(f"the task {name!r} is {kind!r}, expected a subclass of SampledTask")
    task: SampledTask[str] = kind(engine, chat=chat)
    return task
