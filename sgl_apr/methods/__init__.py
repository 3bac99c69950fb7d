"""Ways to reason in parallel under one budget: methods by name, what they come to, and how a task is asked."""

from sgl_apr.methods.result import MODULES, Result, method
from sgl_apr.methods.task import Inapplicable, Task
from sgl_apr.methods.thought import Ask, Thought

NAMES = tuple(MODULES)

__all__ = ["NAMES", "Ask", "Inapplicable", "Result", "Task", "Thought", "method"]
