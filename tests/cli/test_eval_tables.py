"""Tables of evaluations in files and pipes."""

from __future__ import annotations

import pytest

from sgl_apr.cli.eval_tables import print_results
from sgl_apr.evaluation.metrics import MethodResults


@pytest.mark.parametrize(("columns", "complete"), [(None, True), ("60", False)])
def test_tables_in_a_pipe_are_wide_enough(columns, complete, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    print_results(
        "countdown",
        [MethodResults("self_consistency", [], 0.0, reason="it has no words for it")],
        several=False,
    )
    out = capsys.readouterr().out
    assert all(word in out for word in ("self_consistency", "critical path", "one by one")) is complete
    assert "it has no words for it" in out
