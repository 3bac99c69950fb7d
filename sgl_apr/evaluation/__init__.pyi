from .benchmarks.base import Benchmark as Benchmark
from .benchmarks.base import Case as Case
from .benchmarks.registry import benchmark as benchmark
from .cost_model import EngineCost as EngineCost
from .cost_model import predict_speedup as predict_speedup
from .metrics import AttemptMetrics as AttemptMetrics
from .metrics import MethodResults as MethodResults
from .runner import evaluate as evaluate
from .store import ResultStore as ResultStore

__all__ = [
    "AttemptMetrics",
    "Benchmark",
    "Case",
    "EngineCost",
    "MethodResults",
    "ResultStore",
    "benchmark",
    "evaluate",
    "predict_speedup",
]
