"""Ways to reason in parallel under one budget: methods by name, what they come to, and how a task is asked."""

from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.registry import METHOD_MODULES, Result, method
from sgl_apr.methods.task import Inapplicable, Task

NAMES = tuple(METHOD_MODULES)

__all__ = ["NAMES", "Completion", "Inapplicable", "Prompt", "Result", "Task", "method"]
