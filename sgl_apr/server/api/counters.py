"""What trajectories have come to on this server, counted for people and for Prometheus; it runs none."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sgl_apr.runtime.options import ReasonOptions
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
    "text_fallbacks": "Joins in the KV cache that were asked for and became text",
}
LABELS = {"trajectories": ("outcome", OUTCOMES), "joins": ("by", JOINS)}


class ServerCounters:
    """Counts of what has ended. `running` is how many run now."""

    def __init__(self, model: str, prometheus: bool = False) -> None:
        self.running = 0
        self._counts: Counter[tuple[str, str]] = Counter()
        self._meters: dict[tuple[str, str], Any] = _prometheus_counters(model) if prometheus else {}

    def ended(self, outcome: str) -> None:
        """A trajectory has ended so: one of `OUTCOMES`."""
        self._add("trajectories", 1, outcome)

    def finished(self, plan: ReasonOptions, trajectory: Trajectory) -> None:
        """A trajectory is whole."""
        self.ended("finished")
        metrics = trajectory.metrics()
        self._add("tokens", metrics.total)
        self._add("critical_path_tokens", metrics.critical_path)
        self._add("cached_tokens", metrics.cached_tokens)
        self._add("reprefilled_tokens", metrics.reprefilled_tokens)
        self._add("forks", metrics.blocks)
        self._add("text_fallbacks", sum(join.by == "text" for join in trajectory.joins))
        if plan.join == "kv":
            ways = [
                join.by for join in trajectory.joins if len(join.path) % 2
            ]  # of a block, not of a sequence
        else:
            ways = [plan.join or plan.dialect.joins[0]] * metrics.blocks  # type: ignore[list-item]  # checked
        for way in ways:
            self._add("joins", 1, way)

    def report(self) -> dict[str, Any]:
        """The counts as JSON."""
        found: dict[str, Any] = {"running": self.running}
        for name in COUNTERS:
            _, kinds = LABELS.get(name, ("", ()))
            found[name] = {k: self._counts[name, k] for k in kinds} if kinds else self._counts[name, ""]
        return found

    def _add(self, name: str, amount: int, kind: str = "") -> None:
        self._counts[name, kind] += amount
        if self._meters:
            self._meters[name, kind].inc(amount)


def _prometheus_counters(model: str) -> dict[tuple[str, str], Any]:
    """Prometheus counters, each at 0. Only once SGLang has set its directory for many processes."""
    from prometheus_client import Counter as Meter

    found: dict[tuple[str, str], Any] = {}
    for name, text in COUNTERS.items():
        label, kinds = LABELS.get(name, ("", ()))
        meter = Meter(f"sgl_apr:{name}", text, ["model_name", *([label] if label else [])])
        for kind in kinds or ("",):
            found[name, kind] = meter.labels(model, *([kind] if kind else []))
    return found
