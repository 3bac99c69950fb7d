"""The queue of a program's worker, which a destructor may use too.

SGLang ends a program when its state is collected: `__del__` calls `Thread.is_alive` and `Queue.put`. Both take a lock.
The collector may run in a thread that holds this lock, for example while it starts or ends another thread, and then
waits for itself. All other threads that start or end wait with it.
"""

from __future__ import annotations

import queue
import threading
from typing import Any


class ProgramQueue:
    """Stands for `queue.Queue` in SGLang's interpreter. Putting None takes no lock.

    Attributes:
        unfinished_tasks: How many expressions are not executed yet. None, which ends the worker, does not count.
        all_tasks_done: Is notified when there are none.
    """

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()  # its `put` is made for destructors
        self.unfinished_tasks = 0
        self.all_tasks_done = threading.Condition()

    def put(self, expression: Any) -> None:
        """Add an expression, or None, which ends the worker."""
        if expression is not None:
            with self.all_tasks_done:
                self.unfinished_tasks += 1
        self._items.put(expression)

    def get(self) -> Any:
        """Wait for the next expression and return it."""
        return self._items.get()

    def task_done(self) -> None:
        """Count an expression as executed."""
        with self.all_tasks_done:
            self.unfinished_tasks -= 1
            if not self.unfinished_tasks:
                self.all_tasks_done.notify_all()


class QueueModule:
    """Stands for the module `queue` in SGLang's interpreter, which makes the queues of programs with it."""

    Queue = ProgramQueue
    Empty = queue.Empty


def drop_tasks(tasks: Any) -> None:
    """Count all expressions of a queue as executed, because its worker has failed."""
    with tasks.all_tasks_done:
        tasks.unfinished_tasks = 0
        tasks.all_tasks_done.notify_all()


def end_program(executor: Any) -> None:
    """Let the worker of a program end after what was submitted, as `StreamExecutor.end` does, but without a lock."""
    if executor.use_thread and not executor.is_finished:
        executor.queue.put(None)
    executor.backend.end_program(executor)
