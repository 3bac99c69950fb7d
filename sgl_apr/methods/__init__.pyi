from .context_fork import fork as fork
from .context_fork import stream_fork as stream_fork
from .expression import solve as solve
from .fork_result import ForkResult as ForkResult
from .fork_result import TaskResult as TaskResult
from .fork_result import TokenUsage as TokenUsage
from .fork_task import ForkTask as ForkTask
from .fork_task import Merge as Merge
from .prompt import Completion as Completion
from .prompt import Prompt as Prompt
from .prompt_group import decode_group as decode_group
from .registry import METHOD_NAMES as METHOD_NAMES
from .registry import MethodResult as MethodResult
from .registry import method as method
from .self_consistency import vote_is_settled as vote_is_settled
from .session import MethodSession as MethodSession
from .session import method_session as method_session
from .task import AggregationTask as AggregationTask
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
    "AggregationTask",
    "CollaborativeTask",
    "Completion",
    "ForkResult",
    "ForkTask",
    "GraphTask",
    "Inapplicable",
    "Merge",
    "MethodResult",
    "MethodSession",
    "ProgramTask",
    "Prompt",
    "SampledTask",
    "SearchTask",
    "SelfJudgedTask",
    "SkeletonTask",
    "Task",
    "TaskResult",
    "TokenUsage",
    "ValuedSearchTask",
    "VotedSearchTask",
    "decode_group",
    "fork",
    "method",
    "method_session",
    "solve",
    "stream_fork",
    "vote_is_settled",
]
