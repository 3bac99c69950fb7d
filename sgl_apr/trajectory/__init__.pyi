from .blocks import Block as Block
from .blocks import Branch as Branch
from .calls import Call as Call
from .calls import JoinRecord as JoinRecord
from .calls import LimitHit as LimitHit
from .calls import PacingDecision as PacingDecision
from .causal_graph import Causality as Causality
from .causal_graph import causality as causality
from .causal_graph import context_layout as context_layout
from .dataset import from_dataset as from_dataset
from .dataset import to_dataset as to_dataset
from .join_layout import Layout as Layout
from .join_layout import LayoutError as LayoutError
from .metrics import Metrics as Metrics
from .metrics import PhaseCost as PhaseCost
from .metrics import compute_metrics as compute_metrics
from .spans import Finish as Finish
from .spans import Origin as Origin
from .spans import Path as Path
from .spans import Role as Role
from .spans import Span as Span
from .tool_calls import ToolCall as ToolCall
from .tool_calls import ToolOutcome as ToolOutcome
from .trajectory import Trajectory as Trajectory
from .worker_groups import GroupKind as GroupKind
from .worker_groups import GroupRecord as GroupRecord

__all__ = [
    "Block",
    "Branch",
    "Call",
    "Causality",
    "Finish",
    "GroupKind",
    "GroupRecord",
    "JoinRecord",
    "Layout",
    "LayoutError",
    "LimitHit",
    "Metrics",
    "Origin",
    "PacingDecision",
    "Path",
    "PhaseCost",
    "Role",
    "Span",
    "ToolCall",
    "ToolOutcome",
    "Trajectory",
    "causality",
    "compute_metrics",
    "context_layout",
    "from_dataset",
    "to_dataset",
]
