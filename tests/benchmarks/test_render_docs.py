"""Figures in the pages: they are those that were measured and kept."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT

KEPT = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "hardware": {"cores": 2, "cpu": "a processor"},
    "found": {"sequences": 16, "flat_tokens": 28236, "seconds": 0.0123, "peak_mb": 2.24},
}  # fmt: skip
CASE = {"shape": "smollm2", "requests": 8, "new": 0}
FORK = {"branches": 8, "prefix": 1024, "speedup": 2.24}
LEVEL = {"tokens_per_s": 4140.2, "wall_s": [9.94, 28.6, 29.6], "peak_rss_mb": 128.7}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("figures")


def test_pages_have_what_was_kept(figures):
    assert figures.main(["--check"]) == 0


def test_a_section_is_written_anew_and_the_rest_is_left(figures):
    page = "a\n<!-- figures: trie -->\nold\n<!-- end of figures -->\nb\n<!-- figures: soak -->\nold\n<!-- end of figures -->\n"
    new = figures.written(page, {"trie": KEPT})
    assert new == page.replace(
        "old",
        "<!-- 2026-01-02, commit abc, 2 x a processor -->\nThe training structure of 16 sequences, 28,236 tokens in a line, "
        "takes 12 ms and 2.2 MB at the most.",
        1,
    )
    assert figures.written(new, {"trie": KEPT}) == new
    with pytest.raises(ValueError, match="no section 'other', expected one of trie, "):
        figures.written(page.replace("trie", "other"), {})


def test_what_was_measured_is_kept_and_what_failed_is_not(figures, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "KEPT", tmp_path / "kept.json")
    page = tmp_path / "page.md"
    monkeypatch.setattr(figures, "PAGES", [page])
    page.write_text("<!-- figures: trie -->\n<!-- end of figures -->\n")
    measured = tmp_path / "measured.json"
    missed = {"ok": False, "found": KEPT["found"] | {"missed": ["12 ms, expected 10"]}}
    measured.write_text(json.dumps({"trie": KEPT | missed, "soak": KEPT | {"ok": False}}))
    assert figures.main([str(measured), "--check"]) == 1
    assert not (tmp_path / "kept.json").exists()
    assert figures.main([str(measured)]) == 0
    assert json.loads((tmp_path / "kept.json").read_text()).keys() == {"trie"}
    assert "28,236" in page.read_text()
    assert "\n\nNot met: 12 ms, expected 10.\n<!-- end" in page.read_text()
    assert figures.main(["--check"]) == 0
    assert capsys.readouterr().out == "page.md\npage.md\n"


def test_tables(figures):
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
        "over a prefix of 1,024 tokens, 2.2x comes from reading the prefix once."
    )
    text = figures.runtime(
        {
            "loop_overhead_us": 186.2, "wall_ratio_vs_bare": 1.0441, "wall_ratio_vs_bare_ci95": [0.982, 1.082],
            "wall_ratio_vs_serial": 0.4531, "levels": {"1": LEVEL, "1000": LEVEL},
        }
    )  # fmt: skip
    assert "| trajectories at once | 1 | 1,000 |" in text
    assert "| 9.9 / 28.6 / 29.6 | 9.9 / 28.6 / 29.6 |" in text
    none = {"method": "recursive", "accuracy": None, "reason": "no words"}
    some = {
        "method": "apr", "accuracy": 0.3, "total_tokens": 1650.2, "critical_path": 383.0, "engine_calls": 14.3,
        "cached_share": 0.81, "wall_s": 9.5, "one_by_one_s": 6.0, "alone_s": 5.0, "label": "exact",
    }  # fmt: skip
    assert "| `recursive` | none: no words |  |" in figures.methods({"rows": [none, some]})
    assert figures.methods_short({"rows": [none, some]}).splitlines()[2:] == [
        "| `apr` | 30% | 1,650 | 383 | 9.5 | 1.2x |"
    ]


def test_shares_are_rounded_as_people_do(figures):
    assert figures.percent(0.5825) == "58.3%"
    kept = json.loads(figures.KEPT.read_text())
    assert figures.countdown_short(kept["countdown"]["found"]).endswith("58.3%.")
