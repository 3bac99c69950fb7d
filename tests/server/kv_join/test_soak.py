"""KV joins for a long time: forks, joins, aborts, evictions and retractions at random on a server that checks itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.paths import BENCHMARKS

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

SOAK = BENCHMARKS / "kv_join" / "soak.py"
COUNT, FEWEST = (
    400,
    4,
)  # operations, and of each kind that succeed at the least; left to itself, the program does 5,000


@pytest.mark.slow
def test_a_soak():
    argv = [sys.executable, str(SOAK), "--json", "--count", str(COUNT), "--seed", "0"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print("\n", found)
    wrong = {name: found[name] for name in ("wrong", "violations", "held_when_idle")}
    assert wrong == {"wrong": {}, "violations": [], "held_when_idle": 0}
    assert found["compared"]["differ"] == 0
    assert (found["ok"], found["operations"], done.returncode) == (True, COUNT, 0)
    # It was what it says that it is.
    assert found["compared"]["after_joins"] >= 20
    assert found["computed_tokens"] > 3 * found["pool_tokens"]
    assert found["retractions"] >= FEWEST
    for what in (
        "fork",
        "commit",
        "join_without_commit",
        "join_after_commit",
        "nest",
        "continue_sequence",
        "read_sequentially",
    ):
        assert found["outcomes"][f"{what} done"] >= FEWEST
    for what in ("join_unknown_branches", "join_with_wrong_salt", "abort"):
        assert found["outcomes"][f"{what} done"] >= FEWEST // 2
    assert found["outcomes"]["join_without_commit lost"] >= FEWEST
