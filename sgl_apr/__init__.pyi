from . import methods as methods
from .engine.base import Engine as Engine
from .engine.base import GroupRequest as GroupRequest
from .engine.base import Request as Request
from .engine.base import Result as Result
from .engine.http import HttpEngine as HttpEngine
from .engine.load import Load as Load
from .engine.scripted import ByteTokenizer as ByteTokenizer
from .engine.scripted import Reply as Reply
from .engine.scripted import ScriptedEngine as ScriptedEngine
from .errors import AprError as AprError
from .errors import BranchFailed as BranchFailed
from .errors import BudgetExceeded as BudgetExceeded
from .errors import CodeForbidden as CodeForbidden
from .errors import ConversionError as ConversionError
from .errors import EngineError as EngineError
from .errors import EngineTimeout as EngineTimeout
from .errors import GrammarError as GrammarError
from .errors import KvJoinUnavailable as KvJoinUnavailable
from .errors import LaunchError as LaunchError
from .errors import McpError as McpError
from .errors import MissingExtra as MissingExtra
from .errors import SandboxUnavailable as SandboxUnavailable
from .errors import SharedViewUnsupported as SharedViewUnsupported
from .errors import TraceError as TraceError
from .errors import UnsupportedEngine as UnsupportedEngine
from .formats.conversion import convert as convert
from .formats.dialects import Dialect as Dialect
from .formats.dialects import dialect as dialect
from .formats.dialects import dialect_names as dialect_names
from .formats.lenient_parser import Defect as Defect
from .formats.lenient_parser import Reading as Reading
from .formats.lenient_parser import detect as detect
from .formats.lenient_parser import read as read
from .formats.presets import Preset as Preset
from .formats.presets import dialect_for as dialect_for
from .formats.presets import preset as preset
from .methods.context_fork import fork as fork
from .methods.context_fork import stream_fork as stream_fork
from .methods.expression import solve as solve
from .methods.fork_result import ForkResult as ForkResult
from .methods.fork_result import TaskResult as TaskResult
from .methods.fork_result import TokenUsage as TokenUsage
from .methods.fork_task import ForkTask as ForkTask
from .methods.fork_task import Merge as Merge
from .runtime.arguments import ReasonArguments as ReasonArguments
from .runtime.batch import Outcomes as Outcomes
from .runtime.batch import arun_many as arun_many
from .runtime.batch import read_many as read_many
from .runtime.batch import run_many as run_many
from .runtime.branch_scoring import BranchScoring as BranchScoring
from .runtime.budget import Budget as Budget
from .runtime.events import BranchEnded as BranchEnded
from .runtime.events import Delta as Delta
from .runtime.events import Done as Done
from .runtime.events import Event as Event
from .runtime.events import Forked as Forked
from .runtime.events import Joined as Joined
from .runtime.events import RequestFinished as RequestFinished
from .runtime.events import SpanFinished as SpanFinished
from .runtime.events import TextRetracted as TextRetracted
from .runtime.events import ToolCalled as ToolCalled
from .runtime.events import ToolReturned as ToolReturned
from .runtime.events import rebuild as rebuild
from .runtime.frontend.endpoint import Endpoint as Endpoint
from .runtime.frontend.expressions import reason as reason
from .runtime.loop import areason as areason
from .runtime.loop import run as run
from .runtime.loop import stream as stream
from .runtime.options import ReasonOptions as ReasonOptions
from .runtime.pacing import Demand as Demand
from .runtime.pacing import Pacing as Pacing
from .runtime.pacing import affordable_width as affordable_width
from .runtime.retry import Retry as Retry
from .runtime.tools.mcp import mcp_tools as mcp_tools
from .runtime.tools.request import ToolRequest as ToolRequest
from .runtime.tools.tool import Tool as Tool
from .runtime.turn_prompt import next_turn as next_turn
from .server.launch.launcher import Server as Server
from .server.local_engine import LocalEngine as LocalEngine
from .trajectory.blocks import Block as Block
from .trajectory.blocks import Branch as Branch
from .trajectory.calls import Call as Call
from .trajectory.calls import JoinRecord as JoinRecord
from .trajectory.calls import LimitHit as LimitHit
from .trajectory.calls import PacingDecision as PacingDecision
from .trajectory.causal_graph import Causality as Causality
from .trajectory.causal_graph import causality as causality
from .trajectory.dataset import from_dataset as from_dataset
from .trajectory.dataset import to_dataset as to_dataset
from .trajectory.metrics import Metrics as Metrics
from .trajectory.spans import Span as Span
from .trajectory.tool_calls import ToolCall as ToolCall
from .trajectory.trajectory import Trajectory as Trajectory
from .trajectory.worker_groups import GroupRecord as GroupRecord

__version__: str

__all__ = [
    "AprError",
    "Block",
    "Branch",
    "BranchEnded",
    "BranchFailed",
    "BranchScoring",
    "Budget",
    "BudgetExceeded",
    "ByteTokenizer",
    "Call",
    "Causality",
    "CodeForbidden",
    "ConversionError",
    "Defect",
    "Delta",
    "Demand",
    "Dialect",
    "Done",
    "Endpoint",
    "Engine",
    "EngineError",
    "EngineTimeout",
    "Event",
    "ForkResult",
    "ForkTask",
    "Forked",
    "GrammarError",
    "GroupRecord",
    "GroupRequest",
    "HttpEngine",
    "JoinRecord",
    "Joined",
    "KvJoinUnavailable",
    "LaunchError",
    "LimitHit",
    "Load",
    "LocalEngine",
    "McpError",
    "Merge",
    "Metrics",
    "MissingExtra",
    "Outcomes",
    "Pacing",
    "PacingDecision",
    "Preset",
    "Reading",
    "ReasonArguments",
    "ReasonOptions",
    "Reply",
    "Request",
    "RequestFinished",
    "Result",
    "Retry",
    "SandboxUnavailable",
    "ScriptedEngine",
    "Server",
    "SharedViewUnsupported",
    "Span",
    "SpanFinished",
    "TaskResult",
    "TextRetracted",
    "TokenUsage",
    "Tool",
    "ToolCall",
    "ToolCalled",
    "ToolRequest",
    "ToolReturned",
    "TraceError",
    "Trajectory",
    "UnsupportedEngine",
    "affordable_width",
    "areason",
    "arun_many",
    "causality",
    "convert",
    "detect",
    "dialect",
    "dialect_for",
    "dialect_names",
    "fork",
    "from_dataset",
    "mcp_tools",
    "methods",
    "next_turn",
    "preset",
    "read",
    "read_many",
    "reason",
    "rebuild",
    "run",
    "run_many",
    "solve",
    "stream",
    "stream_fork",
    "to_dataset",
]
