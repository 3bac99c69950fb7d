from .expression import solve as solve
from .prompt import Completion as Completion
from .prompt import Prompt as Prompt
from .registry import METHOD_NAMES as METHOD_NAMES
from .registry import MethodResult as MethodResult
from .registry import method as method
from .session import MethodSession as MethodSession
from .session import method_session as method_session
from .task import CollaborativeTask as CollaborativeTask
from .task import GraphTask as GraphTask
from .task import Inapplicable as Inapplicable
from .task import ProgramTask as ProgramTask
from .task import SampledTask as SampledTask
from .task import SearchTask as SearchTask
from .task import SelfJudgedTask as SelfJudgedTask
from .task import SkeletonTask as SkeletonTask
from .task import Task as Task
from .task import ValuedSearchTask as ValuedSearchTask
from .task import VotedSearchTask as VotedSearchTask

__all__ = [
    "METHOD_NAMES",
    "CollaborativeTask",
    "Completion",
    "GraphTask",
    "Inapplicable",
    "MethodResult",
    "MethodSession",
    "ProgramTask",
    "Prompt",
    "SampledTask",
    "SearchTask",
    "SelfJudgedTask",
    "SkeletonTask",
    "Task",
    "ValuedSearchTask",
    "VotedSearchTask",
    "method",
    "method_session",
    "solve",
]
