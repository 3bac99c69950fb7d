"""A soak test of KV joins: random forks, joins, aborts, evictions and retractions on a server that checks itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.paths import BENCHMARKS

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

SOAK = BENCHMARKS / "kv_join" / "soak.py"
COUNT = 400  # operations; the program's default is 5,000
MIN_SUCCESSES = 4  # of each kind of operation


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_soak(page_size: int):
    argv = [sys.executable, str(SOAK), "--json", "--count", str(COUNT), "--seed", "0"]
    if has_pages := page_size > 1:
        argv += ["--page-size", str(page_size), "--pool", "2400"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.stdout, done.stderr[-2000:]
    report = json.loads(done.stdout)
    print("\n", report)
    wrong = {name: report[name] for name in ("wrong", "violations", "held_when_idle")}
    assert wrong == {"wrong": {}, "violations": [], "held_when_idle": 0}
    assert report["compared"]["differ"] == 0
    assert report["compared_groups"]["differ"] == 0
    assert report["compared_groups"]["groups"] >= (0 if has_pages else MIN_SUCCESSES)
    assert (report["ok"], report["operations"], done.returncode) == (True, COUNT, 0)
    # The soak did what it claims to do.
    assert report["compared"]["after_joins"] >= 20
    assert report["computed_tokens"] > 3 * report["pool_tokens"]
    assert report["retractions"] >= MIN_SUCCESSES
    for operation in (
        "fork",
        "commit",
        "join_without_commit",
        "join_after_commit",
        "nest",
        "continue_sequence",
        "read_sequentially",
        *([] if has_pages else ["run_group"]),
    ):
        assert report["outcomes"][f"{operation} done"] >= MIN_SUCCESSES
    group_operation = "send_malformed_group" if has_pages else "abort_group"
    for operation in ("join_unknown_branches", "join_with_wrong_salt", "abort", group_operation):
        assert report["outcomes"][f"{operation} done"] >= MIN_SUCCESSES // 2
    assert report["outcomes"]["join_without_commit lost"] >= MIN_SUCCESSES
