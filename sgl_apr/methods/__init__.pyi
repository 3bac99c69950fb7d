from .expression import solve as solve
from .prompt import Completion as Completion
from .prompt import Prompt as Prompt
from .registry import METHOD_NAMES as METHOD_NAMES
from .registry import MethodResult as MethodResult
from .registry import method as method
from .session import MethodSession as MethodSession
from .session import method_session as method_session
from .task import Inapplicable as Inapplicable
from .task import Task as Task

__all__ = [
    "METHOD_NAMES",
    "Completion",
    "Inapplicable",
    "MethodResult",
    "MethodSession",
    "Prompt",
    "Task",
    "method",
    "method_session",
    "solve",
]
