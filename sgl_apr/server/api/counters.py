"""Counts the trajectories of this server, their tokens, forks and joins, as JSON and for Prometheus."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.trajectory.tool_calls import ToolOutcome
from sgl_apr.trajectory.trajectory import Trajectory

OUTCOMES = ("finished", "failed", "cancelled", "refused")
JOINS = ("text", "kv", "message")
COUNTERS = {
    "trajectories": "Trajectories by how they ended",
    "tokens": "Tokens of finished trajectories, decoded and injected",
    "critical_path_tokens": "Tokens on the critical paths of finished trajectories",
    "cached_tokens": "Prompt tokens that requests of trajectories found in the cache",
    "reprefilled_tokens": "Prompt tokens that were computed once more",
    "forks": "Forks of finished trajectories",
    "joins": "Joins of finished trajectories, by kind",
    "text_fallbacks": "Requested joins in the KV cache that were done as text",
    "tool_calls": "Calls of tools in finished trajectories, by outcome",
    "tool_waits": "Times that a trajectory waited for results of tools from its client, by how that ended; restarted: "
    "with other messages before the calls; unknown: results came for calls that do not wait",
}
GAUGES = {
    "running": "Trajectories that run now",
    "queued": "Trajectories that wait until others have ended",
    "waiting": "Trajectories that wait for results of tools from their clients",
}
WAIT_OUTCOMES = ("continued", "expired", "evicted", "restarted", "cancelled", "unknown")
LABELS = {
    "trajectories": ("outcome", OUTCOMES),
    "joins": ("by", JOINS),
    "tool_calls": ("outcome", get_args(ToolOutcome)),
    "tool_waits": ("outcome", WAIT_OUTCOMES),
}


class ServerCounters:
    """Counts of the trajectories that have ended since the launch, and of those that run and wait now."""

    def __init__(self, model: str, prometheus: bool = False) -> None:
        self._load = dict.fromkeys(GAUGES, 0)
        self._gauges: dict[str, Any] = _prometheus_gauges(model) if prometheus else {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._prometheus: dict[tuple[str, str], Any] = _prometheus_counters(model) if prometheus else {}

    def set_load(self, running: int, queued: int) -> None:
        """Set how many trajectories run and wait now."""
        self._set_gauges(running=running, queued=queued)

    def set_waiting(self, waiting: int) -> None:
        """Set how many trajectories wait for results of tools from their clients."""
        self._set_gauges(waiting=waiting)

    def _set_gauges(self, **values: int) -> None:
        self._load |= values
        for name, value in values.items():
            if gauge := self._gauges.get(name):
                gauge.set(value)

    def count_outcome(self, outcome: str) -> None:
        """Count a trajectory that ended with `outcome`, one of `OUTCOMES`."""
        self._add("trajectories", 1, outcome)

    def count_wait(self, outcome: str) -> None:
        """Count that a trajectory no longer waits for its client, for a reason of `WAIT_OUTCOMES`."""
        self._add("tool_waits", 1, outcome)

    def count_finished(self, options: ReasonOptions, trajectory: Trajectory) -> None:
        """Count a finished trajectory with its tokens, forks and joins."""
        learned = "kv" if trajectory.joins else options.dialect.joins[0]
        self.count_trajectory(trajectory, options.join or learned)

    def count_trajectory(self, trajectory: Trajectory, join: str | None) -> None:
        """Count a finished trajectory whose branches were to join by `join`, one of `JOINS`, if they were to."""
        self.count_outcome("finished")
        metrics = trajectory.metrics()
        self._add("tokens", metrics.total)
        self._add("critical_path_tokens", metrics.critical_path)
        self._add("cached_tokens", metrics.cached_tokens)
        self._add("reprefilled_tokens", metrics.reprefilled_tokens)
        self._add("forks", metrics.blocks)
        self._add("text_fallbacks", sum(join.by == "text" for join in trajectory.joins))
        for call in trajectory.tool_calls:
            self._add("tool_calls", 1, call.outcome)
        if join == "kv":
            # Odd paths are of blocks. Even ones are of sequences that fell back to text later.
            kinds = [join.by for join in trajectory.joins if len(join.path) % 2]
        else:
            kinds = [join] * metrics.blocks if join else []  # type: ignore[list-item]  # checked
        for kind in kinds:
            self._add("joins", 1, kind)

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a JSON object. Counters with labels are objects themselves."""
        counts: dict[str, Any] = dict(self._load)
        for name in COUNTERS:
            _, values = LABELS.get(name, ("", ()))
            counts[name] = {v: self._counts[name, v] for v in values} if values else self._counts[name, ""]
        return counts

    def _add(self, name: str, amount: int, label: str = "") -> None:
        self._counts[name, label] += amount
        if self._prometheus:
            self._prometheus[name, label].inc(amount)


def _prometheus_gauges(model: str) -> dict[str, Any]:
    """Return Prometheus gauges at 0, by name. See `_prometheus_counters`."""
    from prometheus_client import Gauge

    return {
        name: Gauge(f"sgl_apr:{name}", text, ["model_name"], multiprocess_mode="mostrecent").labels(model)
        for name, text in GAUGES.items()
    }


def _prometheus_counters(model: str) -> dict[tuple[str, str], Any]:
    """Return Prometheus counters at 0, by name and label.

    Call it only after SGLang has set the directory that prometheus_client shares between processes.
    """
    from prometheus_client import Counter as PrometheusCounter

    counters: dict[tuple[str, str], Any] = {}
    for name, description in COUNTERS.items():
        label, values = LABELS.get(name, ("", ()))
        labels = ["model_name", *([label] if label else [])]
        counter = PrometheusCounter(f"sgl_apr:{name}", description, labels)
        for value in values or ("",):
            counters[name, value] = counter.labels(model, *([value] if value else []))
    return counters
