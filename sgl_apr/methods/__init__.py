"""Ways to reason in parallel under one budget: methods by name, what they come to, and how a task is asked."""

from sgl_apr.methods.result import METHOD_MODULES, Result, method
from sgl_apr.methods.task import Inapplicable, Task
from sgl_apr.methods.thought import Completion, Prompt

NAMES = tuple(METHOD_MODULES)

__all__ = ["NAMES", "Completion", "Inapplicable", "Prompt", "Result", "Task", "method"]
