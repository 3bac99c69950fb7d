"""Long texts in one prompt and in parts: what is measured, what does not fit, and that a measurement continues."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import sgl_apr as apr
from benchmarks.common.model_figures import long_context as figures
from benchmarks.quality import long_context
from sgl_apr.errors import AprError
from sgl_apr.evaluation.benchmarks.long_context import ledger
from sgl_apr.evaluation.store import open_evaluation

READER: dict[str, Any] = {"part_tokens": 320, "reply_tokens": 32}


def attempt(engine: apr.ScriptedEngine, method: str, output: Path | None, **options: Any) -> dict[str, Any]:
    """The row of a method for four small ledgers, one of each kind."""
    with open_evaluation(output, {"task": "ledger:1k"}) as store:
        return long_context.row(
            asyncio.run(long_context.attempt(engine, ledger("1k", 4), method, options, store))  # type: ignore[arg-type]
        )


def test_a_row_has_the_share_of_each_kind_and_the_longest_context() -> None:
    first = next(case for case in ledger("1k", 4).cases if case.name == "needle 1")
    number = first.problem.partition("in line ")[2].split("?")[0]
    line = next(line for line in first.problem.splitlines() if line.startswith(f"[{number}]"))
    coins = line.split(" coins")[0].rpartition(" ")[2]
    engine = apr.ScriptedEngine(lambda request, prompt: f"Answer: {coins if line in prompt else 'none'}")
    row = attempt(engine, "sequential", None)
    assert row["by_kind"] == {"needle": 1, "count": 0, "sum": 0, "largest": 0}
    assert (row["accuracy"], row["calls"]) == (0.25, 1)
    assert row["longest_context"] > 2000, "one prompt holds all of the text"
    parts = attempt(engine, "recursive", None, **READER)
    assert parts["calls"] > 5
    assert parts["longest_context"] < row["longest_context"] / 2


def test_a_prompt_that_does_not_fit_has_a_row_that_says_so() -> None:
    def too_long(request: apr.Request, prompt: str) -> str:
        raise AprError("the prompt has 16829 tokens, expected fewer than the 8192 of the engine's context")

    row = attempt(apr.ScriptedEngine(too_long), "sequential", None)
    assert row["accuracy"] is None
    assert "16829 tokens" in row["reason"]
    assert "the prompt does not fit" in figures({"rows": [{"size": "16k", "problems": 4} | row]})


def test_attempts_that_are_kept_are_not_made_again(tmp_path: Path) -> None:
    engine = apr.ScriptedEngine(lambda request, prompt: "Answer: 7")
    first = attempt(engine, "sequential", tmp_path)
    made = len(engine.requests)
    again = attempt(engine, "sequential", tmp_path)
    assert again | {"seconds": 0} == first | {"seconds": 0}, "the seconds of kept attempts are rounded"
    assert len(engine.requests) == made


@pytest.mark.parametrize("argv", [["--limit", "many"], ["--limit", "0"], ["--limit", "1,2,3"]])
def test_a_wrong_limit_is_an_error(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["long_context", *argv])
    with pytest.raises(SystemExit) as end:
        long_context.main()
    assert end.value.code == 2
    assert "expected" in capsys.readouterr().err
