"""Fuzzers of all readers of documents: only errors of this package come out, in time and without a growth of memory."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fuzzed_documents import CHECKS

every = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
LONG_RUNS = {
    "check_text": 6_000,
    "check_json": 20_000,
    "check_file": 12_000,
    "check_event": 14_000,
}  # 52,000 documents
MAX_S = 2.0  # of one document
MAX_GROWTH = 1.05


@every
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rng=st.randoms(use_true_random=False))
def test_only_our_errors_come_out(
    check: Callable[[random.Random, Path], None], rng: random.Random, tmp_path: Path
):
    check(rng, tmp_path)


def resident_bytes() -> int:
    """The memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.timeout(3600)
@every
def test_thousands_of_documents_take_no_time_and_no_memory(
    check: Callable[[random.Random, Path], None], tmp_path: Path
):
    slowest, before, count = 0.0, 0, LONG_RUNS[check.__name__]
    for seed in range(count):
        began = time.thread_time()  # of this thread: the machine may be busy otherwise
        try:
            check(random.Random(seed), tmp_path)
        except Exception as error:
            raise AssertionError(f"{check.__name__} with seed {seed}") from error
        slowest = max(slowest, time.thread_time() - began)
        assert slowest < MAX_S, f"{check.__name__} with seed {seed} took {slowest:.1f} s"
        if seed == count // 5:  # caches are full by then
            before = resident_bytes()
    assert resident_bytes() <= before * MAX_GROWTH
