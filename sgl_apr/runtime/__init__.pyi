from .arguments import ReasonArguments as ReasonArguments
from .batch import Outcomes as Outcomes
from .batch import arun_many as arun_many
from .batch import read_many as read_many
from .batch import run_many as run_many
from .branch_scoring import BranchScoring as BranchScoring
from .budget import Budget as Budget
from .event_json import event_from_json as event_from_json
from .event_json import event_to_json as event_to_json
from .events import BranchEnded as BranchEnded
from .events import Delta as Delta
from .events import Done as Done
from .events import Event as Event
from .events import Forked as Forked
from .events import Joined as Joined
from .events import RequestFinished as RequestFinished
from .events import SpanFinished as SpanFinished
from .events import TextRetracted as TextRetracted
from .events import ToolCalled as ToolCalled
from .events import ToolReturned as ToolReturned
from .events import rebuild as rebuild
from .frontend.endpoint import Endpoint as Endpoint
from .frontend.expressions import reason as reason
from .loop import areason as areason
from .loop import run as run
from .loop import stream as stream
from .options import ReasonOptions as ReasonOptions
from .pacing import Demand as Demand
from .pacing import Pacing as Pacing
from .pacing import affordable_width as affordable_width
from .retry import Retry as Retry
from .tools.mcp import mcp_tools as mcp_tools
from .tools.request import ToolRequest as ToolRequest
from .tools.tool import Tool as Tool
from .turn_prompt import next_turn as next_turn

__all__ = [
    "BranchEnded",
    "BranchScoring",
    "Budget",
    "Delta",
    "Demand",
    "Done",
    "Endpoint",
    "Event",
    "Forked",
    "Joined",
    "Outcomes",
    "Pacing",
    "ReasonArguments",
    "ReasonOptions",
    "RequestFinished",
    "Retry",
    "SpanFinished",
    "TextRetracted",
    "Tool",
    "ToolCalled",
    "ToolRequest",
    "ToolReturned",
    "affordable_width",
    "areason",
    "arun_many",
    "event_from_json",
    "event_to_json",
    "mcp_tools",
    "next_turn",
    "read_many",
    "reason",
    "rebuild",
    "run",
    "run_many",
    "stream",
]
