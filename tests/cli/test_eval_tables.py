"""Tables of evaluations: what is printed into a file or a pipe can be read there."""

from __future__ import annotations

import pytest

from sgl_apr.cli.eval_tables import print_results
from sgl_apr.evaluation.metrics import MethodResults


@pytest.mark.parametrize(("columns", "whole"), [(None, True), ("60", False)])
def test_a_pipe_is_wide_enough(columns, whole, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    print_results(
        "countdown",
        [MethodResults("self_consistency", [], 0.0, reason="it has no words for it")],
        several=False,
    )
    out = capsys.readouterr().out
    assert all(word in out for word in ("self_consistency", "critical path", "one by one")) is whole
    assert "it has no words for it" in out
