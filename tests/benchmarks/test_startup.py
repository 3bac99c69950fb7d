"""benchmarks/startup.py reads the phases of a start from the log of a server."""

from __future__ import annotations

import pytest

from benchmarks import startup
from sgl_apr.server import constants

LINES = [
    (1.0, "Available plugins"),
    (9.0, "[2026-11-29 06:19:14] server_args={'model_path': 'm'}"),
    (10.5, "[2026-11-29 06:19:16] Load weight end. elapsed=0.02 s, type=LlamaForCausalLM"),
    (11.5, "[2026-11-29 06:19:17] Engine startup timings (s): load_weight=0.02"),
    (11.25, "[2026-11-29 06:19:17] INFO:     Uvicorn running on http://127.0.0.1:42711"),
    (12.0, "[2026-11-29 06:19:18] The server is fired up and ready to roll!"),
    (13.0, "sgl-apr ready: http://127.0.0.1:30000 (model m, cpu, apr_cpu)"),
]


def test_phases_add_up_to_the_time_until_the_server_is_ready():
    phases = startup.phase_seconds(0.5, LINES)
    assert list(phases.values()) == [8.5, 1.5, 1.0, 0.0, 0.5, 1.0]
    assert sum(phases.values()) == 13.0 - 0.5


def test_a_server_that_does_not_start_is_an_error_with_its_last_line():
    with pytest.raises(
        ValueError, match=r"no line 'Engine startup timings' and ends with '.*LlamaForCausalLM'"
    ):
        startup.phase_seconds(0.0, LINES[:3])
    with pytest.raises(ValueError, match="ends with 'nothing'"):
        startup.phase_seconds(0.0, [])


def test_a_row_has_the_median_and_the_spread():
    starts = [
        startup.Start(dict.fromkeys(startup.PHASES, seconds), 9 * seconds) for seconds in (1.0, 2.0, 4.0)
    ]
    row = startup.row("default", starts)
    assert (row["runs"], row["seconds"], row["min_s"], row["max_s"]) == (3, 12.0, 6.0, 24.0)
    assert row["cpu_s"] == 18.0
    assert set(row["phases"].values()) == {2.0}


def test_bars_are_compared_with_the_default_start_and_the_demo():
    rows = [{"variant": "none of these", "seconds": 35.0}, {"variant": "default", "seconds": 21.0}]
    assert startup.missed({"rows": rows}) == ["serve takes 21.0 s, expected at most 20"]
    rows[1]["seconds"] = 20.0
    assert startup.missed({"rows": rows, "demo": {"seconds": 36.5}}) == [
        "demo takes 36.5 s, expected at most 35"
    ]
    assert startup.missed({"rows": rows[:1]}) == []


def test_every_switch_of_a_start_is_measured():
    switches = {
        constants.PAUSE_GC_ENV, constants.SKIP_FLASHINFER_ENV, constants.ONE_MODEL_MODULE_ENV, constants.MASK_KERNEL_ENV,
        constants.QUICK_WARMUP_ENV, constants.FORK_START_ENV,
    }  # fmt: skip
    assert {variable for off in startup.VARIANTS.values() for variable in off} == switches
    assert startup.VARIANTS["default"] == ()
