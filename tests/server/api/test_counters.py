"""Counts of a server, without a server."""

from __future__ import annotations

from sgl_apr.server.api.counters import ServerCounters
from tests.support.tool_trajectories import tool_trajectory


def test_calls_of_tools_are_counted_by_outcome():
    counters = ServerCounters("m")
    for _ in range(2):
        counters.count_trajectory(tool_trajectory("threadweaver"), "text")
    found = counters.to_json()
    assert {name: n for name, n in found["tool_calls"].items() if n} == {"ok": 6, "error": 2, "length": 2}
    assert found["joins"]["text"] == 2
    assert found["trajectories"]["finished"] == 2
