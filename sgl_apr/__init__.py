"""Adaptive parallel reasoning for SGLang: public names; nothing heavy is imported before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl_apr import methods as methods
    from sgl_apr.engine.base import Engine as Engine
    from sgl_apr.engine.base import Load as Load
    from sgl_apr.engine.base import Request as Request
    from sgl_apr.engine.base import Result as Result
    from sgl_apr.engine.http import HttpEngine as HttpEngine
    from sgl_apr.engine.scripted import ByteTokenizer as ByteTokenizer
    from sgl_apr.engine.scripted import Reply as Reply
    from sgl_apr.engine.scripted import ScriptedEngine as ScriptedEngine
    from sgl_apr.errors import AprError as AprError
    from sgl_apr.errors import BranchFailed as BranchFailed
    from sgl_apr.errors import BudgetExceeded as BudgetExceeded
    from sgl_apr.errors import CodeForbidden as CodeForbidden
    from sgl_apr.errors import ConversionError as ConversionError
    from sgl_apr.errors import EngineError as EngineError
    from sgl_apr.errors import EngineTimeout as EngineTimeout
    from sgl_apr.errors import GrammarError as GrammarError
    from sgl_apr.errors import KvJoinUnavailable as KvJoinUnavailable
    from sgl_apr.errors import LaunchError as LaunchError
    from sgl_apr.errors import SandboxUnavailable as SandboxUnavailable
    from sgl_apr.errors import TraceError as TraceError
    from sgl_apr.errors import UnsupportedEngine as UnsupportedEngine
    from sgl_apr.formats.conversion import convert as convert
    from sgl_apr.formats.dialect import Dialect as Dialect
    from sgl_apr.formats.dialect import dialect as dialect
    from sgl_apr.formats.dialect import dialect_names as dialect_names
    from sgl_apr.formats.lenient_parser import Defect as Defect
    from sgl_apr.formats.lenient_parser import Reading as Reading
    from sgl_apr.formats.lenient_parser import detect as detect
    from sgl_apr.formats.lenient_parser import read as read
    from sgl_apr.formats.presets import Preset as Preset
    from sgl_apr.formats.presets import dialect_for as dialect_for
    from sgl_apr.formats.presets import preset as preset
    from sgl_apr.methods.expression import solve as solve
    from sgl_apr.runtime.batch import Outcomes as Outcomes
    from sgl_apr.runtime.batch import arun_many as arun_many
    from sgl_apr.runtime.batch import read_many as read_many
    from sgl_apr.runtime.batch import run_many as run_many
    from sgl_apr.runtime.budget import Budget as Budget
    from sgl_apr.runtime.events import BranchEnded as BranchEnded
    from sgl_apr.runtime.events import Delta as Delta
    from sgl_apr.runtime.events import Done as Done
    from sgl_apr.runtime.events import Forked as Forked
    from sgl_apr.runtime.events import Joined as Joined
    from sgl_apr.runtime.events import RequestFinished as RequestFinished
    from sgl_apr.runtime.events import SpanFinished as SpanFinished
    from sgl_apr.runtime.events import TextRetracted as TextRetracted
    from sgl_apr.runtime.events import rebuild as rebuild
    from sgl_apr.runtime.frontend.endpoint import Endpoint as Endpoint
    from sgl_apr.runtime.frontend.expressions import reason as reason
    from sgl_apr.runtime.loop import areason as areason
    from sgl_apr.runtime.loop import run as run
    from sgl_apr.runtime.loop import stream as stream
    from sgl_apr.runtime.pacing import Demand as Demand
    from sgl_apr.runtime.pacing import Pacing as Pacing
    from sgl_apr.runtime.retry import Retry as Retry
    from sgl_apr.server.launch.launcher import Server as Server
    from sgl_apr.server.local_engine import LocalEngine as LocalEngine
    from sgl_apr.trajectory.blocks import Block as Block
    from sgl_apr.trajectory.blocks import Branch as Branch
    from sgl_apr.trajectory.calls import Call as Call
    from sgl_apr.trajectory.calls import JoinRecord as JoinRecord
    from sgl_apr.trajectory.calls import LimitHit as LimitHit
    from sgl_apr.trajectory.calls import PacingDecision as PacingDecision
    from sgl_apr.trajectory.causality import Causality as Causality
    from sgl_apr.trajectory.causality import causality as causality
    from sgl_apr.trajectory.dataset import from_dataset as from_dataset
    from sgl_apr.trajectory.dataset import to_dataset as to_dataset
    from sgl_apr.trajectory.metrics import Metrics as Metrics
    from sgl_apr.trajectory.spans import Span as Span
    from sgl_apr.trajectory.trajectory import Trajectory as Trajectory

_HOME = {
    "blocks": ("Block", "Branch"),
    "budget": ("Budget",),
    "causal": ("Causality", "causality"),
    "conversion": ("convert",),
    "dataset": ("from_dataset", "to_dataset"),
    "dialects": ("Dialect", "dialect", "dialect_names"),
    "engine.base": ("Engine", "Load", "Request", "Result"),
    "engine.endpoint": ("Endpoint",),
    "engine.http": ("HttpEngine",),
    "engine.local": ("LocalEngine",),
    "engine.scripted": ("ByteTokenizer", "Reply", "ScriptedEngine"),
    "errors": (
        "AprError",
        "BranchFailed",
        "BudgetExceeded",
        "CodeForbidden",
        "ConversionError",
        "EngineError",
        "EngineTimeout",
        "GrammarError",
        "KvJoinUnavailable",
        "LaunchError",
        "SandboxUnavailable",
        "TraceError",
        "UnsupportedEngine",
    ),
    "metrics": ("Metrics",),
    "presets": ("Preset", "dialect_for", "preset"),
    "reading": ("Defect", "Reading", "detect", "read"),
    "runtime.dsl": ("reason", "solve"),
    "runtime.events": ("Called", "Delta", "Done", "Ended", "Forked", "Joined", "Retried", "Wrote", "rebuild"),
    "runtime.loop": ("areason", "run", "stream"),
    "runtime.many": ("Outcomes", "arun_many", "read_many", "run_many"),
    "runtime.pacing": ("Demand", "Pacing"),
    "runtime.retry": ("Retry",),
    "server.launch": ("Server",),
    "spans": ("Span",),
    "trajectory": ("Call", "Decision", "Join", "Limit", "Trajectory"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted([*_MODULE, "methods"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used (PEP 562)."""
    if name == "methods":
        return import_module("sgl_apr.methods")
    if name not in _MODULE:
        raise AttributeError(f"module 'sgl_apr' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"sgl_apr.{_MODULE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
