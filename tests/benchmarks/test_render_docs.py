"""docs/benchmarks.md shows the results in docs/benchmarks.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import render_docs, run_all
from benchmarks.common import figures
from tests.support.paths import BENCHMARKS, DOCS

TREE = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "hardware": {"cores": 2, "cpu": "a processor"}, "ok": True,
    "command": ["-m", "benchmarks.training.tree_build", "--check", "--json"],
    "found": {"sequences": 16, "flat_tokens": 28236, "seconds": 0.0123, "peak_mb": 2.24},
}  # fmt: skip
CASE = {"shape": "smollm2", "requests": 8, "new": 0}
FORK = {"branches": 8, "prefix": 1024, "speedup": 2.24}
LEVEL = {
    "trajectories": 256, "tokens_per_s": 4140.2, "wall_s": [9.94, 28.6, 29.6], "peak_rss_mb": 128.7,
    "mean_parallel": 241.3, "cached_share": 0.861,
    "cpu_s": {"client": 2.56, "http": 1.28, "scheduler": 7.68, "detokenizer": 0.3},
}  # fmt: skip


def test_the_page_shows_the_stored_results():
    assert render_docs.main(["--check"]) == 0


def test_every_benchmark_has_a_section_and_every_result_has_figures():
    assert set(render_docs.SECTIONS) == {b.name for b in run_all.benchmarks(BENCHMARKS)}
    stored = json.loads((DOCS / "benchmarks.json").read_text())
    assert set(stored) == {name for name, about in render_docs.SECTIONS.items() if about.render}


def test_a_section_has_title_command_source_and_figures():
    text = render_docs.page({"training.tree_build": TREE})
    assert (
        "\n## Building a training tree\n\n"
        "How long it takes to merge the sequences of a trajectory into one training tree, and the memory it takes.\n\n"
        "`python -m benchmarks.training.tree_build --check`\n\n"
        "Measured on 2 cores of a processor, 2026-01-02, commit abc.\n\n"
        "The training tree of 16 sequences, 28,236 tokens in one row, takes 12 ms and at most 2.2 MB.\n\n"
    ) in text
    assert "`python -m benchmarks.kv_join.soak`\n\nNot measured yet." in text


def test_new_results_are_merged_and_failures_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    measured = tmp_path / "measured.json"
    missed = {"ok": False, "found": TREE["found"] | {"missed": ["12 ms, expected 10"]}}
    measured.write_text(
        json.dumps(
            {"training.tree_build": TREE | missed, "kv_join.soak": TREE | {"ok": False}, "kernels.gpu": TREE}
        )
    )
    assert render_docs.main([str(measured), "--check"], tmp_path) == 1
    assert not (tmp_path / "benchmarks.json").exists()
    assert not (tmp_path / "benchmarks.md").exists()
    assert render_docs.main([str(measured)], tmp_path) == 0
    assert json.loads((tmp_path / "benchmarks.json").read_text()).keys() == {"training.tree_build"}
    page = (tmp_path / "benchmarks.md").read_text()
    assert "28,236" in page
    assert "\n\nBars missed: 12 ms, expected 10.\n\n## " in page
    assert render_docs.main(["--check"], tmp_path) == 0
    assert capsys.readouterr().out == "benchmarks.md\nbenchmarks.md\n"


def test_unknown_results_are_refused(tmp_path: Path):
    (tmp_path / "benchmarks.json").write_text(json.dumps({"other": TREE}))
    with pytest.raises(SystemExit, match=r"no section for other; expected names from masks\.validity, "):
        render_docs.main(["--check"], tmp_path)


def test_tables():
    timings = [
        {"case": CASE | {"name": name, "shape": shape, "new": new}, "speedup": speedup, "max_difference": 8e-7}
        for shape in ("smollm2", "tiny")
        for name, new in (
            ("decode", 0), ("decode, fork of 8", 0), ("extend", 2), ("extend, fork of 8", 10), ("prefill", 1000),
        )
        for speedup in (3.68, 7.6)
    ]  # fmt: skip
    timings += [
        t | {"case": t["case"] | {"requests": n}}
        for t in timings
        if t["case"]["name"] == "decode"
        for n in (1, 64)
    ]
    text = figures.attention({"timings": timings, "fork": FORK})
    assert "| decode, 8-16 requests | 3.7-7.6x | 3.7-7.6x |" in text
    assert text.replace("\n", " ").endswith(
        "over a prefix of 1,024 tokens, reading the prefix once makes it 2.2x as fast."
    )
    text = figures.overhead(
        {
            "loop_overhead_us": 186.2, "loop_cpu_us": 141.6, "wall_ratio_vs_bare": 1.0441, "wall_ratio_vs_bare_ci95": [0.982, 1.082],
            "wall_ratio_vs_serial": 0.4531, "levels": {"1": LEVEL, "1000": LEVEL},
        }
    )  # fmt: skip
    assert "| CPU time of the loop per engine call, without the engine | 142 us | 150 us |" in text
    assert "| concurrent trajectories | 1 | 1,000 |" in text
    assert "| 9.9 / 28.6 / 29.6 | 9.9 / 28.6 / 29.6 |" in text
    assert "| prompt tokens from the cache | 86.1% | 86.1% |" in text
    assert "| CPU ms of a trajectory: scheduler and model | 30 | 30 |" in text
    steps = [
        {"kind": kind, "prompt_tokens": tokens, "ratio": ratio, "interval": [ratio - 0.01, ratio + 0.01], "independent_ms": tokens / 2}
        for tokens in (256, 2048) for kind, ratio in (("group_think", 1.012), ("hogwild", 1.021))
    ]  # fmt: skip
    text = figures.groups(
        {
            "equal": {"group_think": [1682, 1682], "hogwild": [3364, 3364]}, "logprob_error": 3.9e-5, "steps": steps,
            "controls": {"group_think": {"blind": [500, 1000]}, "hogwild": {"unturned": [250, 1000]}},
        }
    )  # fmt: skip
    assert (
        "| Group Think | 1,682 of 1,682 | blind 50.0% | 1.01x (1.00 to 1.02) | 1.01x (1.00 to 1.02) |" in text
    )
    assert "take 128 ms after 256 tokens and 1024 ms after 2,048 tokens" in text.replace("\n", " ")
    none = {"method": "recursive", "accuracy": None, "reason": "no words"}
    some = {
        "method": "apr", "accuracy": 0.3, "total_tokens": 1650.2, "critical_path": 383.0, "engine_calls": 14.3,
        "cached_share": 0.81, "wall_s": 9.5, "one_by_one_s": 6.0, "alone_s": 5.0, "label": "exact",
    }  # fmt: skip
    assert figures.methods({"rows": [none, some]}).splitlines()[2:] == [
        "| `recursive` | not applicable: no words |  |  |  |  |  |  |  |",
        "| `apr` | 30% | 1,650 | 383 | 14.3 | 81% | 9.5 | 1.2x | exact |",
    ]


def test_halves_are_rounded_up():
    assert figures.percent(0.5825) == "58.3%"
    stored = json.loads((DOCS / "benchmarks.json").read_text())
    assert "| solved (95% interval) | 58.3% (56.2 to 60.5) |" in render_docs.page(
        {"quality.countdown": stored["quality.countdown"]}
    )
