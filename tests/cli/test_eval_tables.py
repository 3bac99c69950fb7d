"""Tables of evaluations: complete in files and pipes, and as many columns as fit in a terminal."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from sgl_apr.cli.eval_tables import RESULT_COLUMNS, TOOL_COLUMNS, print_comparisons, print_results
from sgl_apr.evaluation.compare import MethodPair
from sgl_apr.evaluation.metrics import AttemptMetrics, MethodResults

NAMES = [name for name, _, _ in RESULT_COLUMNS]


@pytest.mark.parametrize(
    ("columns", "wide", "left_out"),
    [
        (None, False, 0),
        ("60", True, 0),
        ("160", False, 1),
        ("120", False, 5),
        ("80", False, 9),
        ("40", False, 12),
    ],
)
def test_a_table_leaves_out_columns_and_cuts_no_name(columns, wide, left_out, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    print_results(
        "countdown",
        [MethodResults("self_consistency", [], 0.0, reason="it has no words for it")],
        several=False,
        wide=wide,
    )
    out = capsys.readouterr().out
    table, _, note = out.partition("Left out at this width: ")
    note = " ".join(note.partition(" shows all)")[0].split())
    assert "it has no words for it" in out
    assert "self_consistency" in table
    assert "…" not in out
    missing = [name for name in NAMES if name not in table]
    assert len(missing) == left_out
    assert note == (f"{', '.join(missing)} (--wide or --json" if missing else "")
    if columns and not wide:
        assert max(map(len, table.splitlines())) <= int(columns)


def test_columns_of_tools_are_shown_if_there_are_any(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "240")
    tooled = AttemptMetrics("p", 4, True, 100, 60, 40, 3, 1, tool_calls=4, tool_s=4.0, critical_tool_s=1.0)
    print_results("countdown", [MethodResults("apr", [tooled, replace(tooled, tool_calls=2)])], False)
    lines = [[c.strip() for c in re.split("[┃│]", line)] for line in capsys.readouterr().out.splitlines()]
    found = dict(zip(lines[1], lines[3], strict=True))
    assert [found[name] for name, _, _ in TOOL_COLUMNS] == ["3.0", "4.00", "1.00"]
    print_results("countdown", [MethodResults("apr", [replace(tooled, tool_calls=0)])], False)
    assert "tool" not in capsys.readouterr().out


def test_a_comparison_has_columns_of_tools_if_there_are_any(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "240")
    tooled = AttemptMetrics("p", 4, True, 100, 60, 40, 3, 1, tool_calls=4, tool_s=4.0)
    without = replace(tooled, tool_calls=0, tool_s=0.0)

    def pair(first: AttemptMetrics, second: AttemptMetrics) -> MethodPair:
        return MethodPair(("a:apr", "b:apr"), (MethodResults("apr", [first]), MethodResults("apr", [second])))

    print_comparisons([pair(without, tooled)])
    lines = [[c.strip() for c in re.split("[┃│]", line)] for line in capsys.readouterr().out.splitlines()]
    shown = dict(zip(lines[1], lines[3], strict=True))
    assert shown["tool calls"] == "+4.0 (+4.0 to +4.0)"
    assert shown["tool seconds"] == "+4.00 (+4.00 to +4.00)"
    compared = pair(without, tooled).as_json()
    assert compared["tool_calls"] == {"means": [0, 4], "difference": 4, "ci95": [4, 4]}
    print_comparisons([pair(without, without)])
    assert "tool" not in capsys.readouterr().out
