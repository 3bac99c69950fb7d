"""The bars and the table of the benchmark of agents."""

from __future__ import annotations

from benchmarks import agents
from benchmarks.common import figures

ROW = {
    "workers": 4, "context": 20467, "min_cached_share": 1.0, "wall_s": 2.0, "serial_wall_s": 5.0, "gain": 2.5,
    "second_turn_cached": 0.996,
}  # fmt: skip


def test_bars():
    assert agents.missed_bars([ROW]) == []
    wrong = {"min_cached_share": 0.5, "wall_s": 6.0, "second_turn_cached": 0.55}
    missed = agents.missed_bars([ROW | wrong])
    assert missed == [
        "4 workers over 20467 tokens: a worker found 50.0% of what all share in the cache",
        "4 workers over 20467 tokens: 6.0 s at once, 5.0 s one after another",
        "4 workers over 20467 tokens: the second turn found 55.0% in the cache",
    ]


def test_the_table():
    text = figures.agents({"rows": [ROW]})
    assert text.splitlines()[-1] == "| 4 | 20,467 | 100.0% | 2.00 | 5.00 | 2.50 | 99.6% |"
