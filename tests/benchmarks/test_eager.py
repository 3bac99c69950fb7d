"""The figures of the benchmark of branches that start while their fork is being written."""

from __future__ import annotations

import asyncio

import pytest

import sgl_apr as apr
from benchmarks.common import figures
from benchmarks.runtime import eager

OUTLINES = "<Spawn>\n<Message>1:a</Message>\n<Message>2:bb</Message>\n"
REPLIES = {"a": "x" * 30 + "<Return>A</Return>", "bb": "y<Return>B</Return>"}


@pytest.fixture(scope="module")
def forked() -> apr.Trajectory:
    def script(request: apr.Request, prompt: str) -> str:
        return REPLIES.get(prompt) or ("Done." if "<Join>" in prompt else f"Go. {OUTLINES}</Spawn>")

    engine = apr.ScriptedEngine(script, apr.ByteTokenizer(apr.dialect("spawn").tags))
    return asyncio.run(apr.areason(engine, "Q: ", "spawn"))


def test_what_a_longest_branch_that_is_listed_first_saves(forked: apr.Trajectory):
    tokenizer = apr.ByteTokenizer(apr.dialect("spawn").tags)
    (fork,) = (span for span in forked.spans if span.role == "fork")
    second = OUTLINES.index("<Message>2")
    ends = [len(tokenizer.encode(OUTLINES[:second])), len(tokenizer.encode(OUTLINES))]
    assert eager.outline_ends(fork.token_ids, tokenizer) == ends
    # The first branch is the longest by far, and starts as many tokens earlier.
    assert eager.hidden_tokens(forked, tokenizer) == len(fork.token_ids) - ends[0]


def attempts(plain: float, early: float, text: str = "same") -> eager.Attempts:
    def one(seconds: float) -> list[dict]:
        shared = {"tokens": 100, "calls": 5, "branches": 3, "text": text}
        return [shared | {"latency_s": seconds, "critical_path": 40 * seconds}] * 2

    return dict(zip(eager.WAYS, (one(plain), one(early)), strict=True))


def test_medians_ratios_and_bars():
    measured = [attempts(1.0, 0.9), attempts(2.0, 1.9), attempts(4.0, 3.0)]
    measured[2]["the fork"][0] = measured[2]["the fork"][0] | {"text": "other"}
    result = eager.report(measured)
    assert [row["latency_s"][0] for row in result["rows"]] == [2.0, 1.9]
    assert result["ratio"]["latency_s"] == (0.9, 0.75, 0.95)
    assert (result["problems"], result["rounds"], result["same_text"]) == (3, 2, 2)
    assert eager.missed_bars(result) == []
    slower = eager.report([attempts(1.0, 1.1)] * 3)
    assert eager.missed_bars(slower) == ["critical path ratio up to 1.100, expected below 1"]
    more = result | {"ratio": result["ratio"] | {"tokens": (1.2, 1.1, 1.3)}}
    assert eager.missed_bars(more) == ["1.200 times as many tokens, expected 1"]


def test_the_table():
    text = figures.eager(eager.report([attempts(1.0, 0.5)] * 2))
    assert "| the fork | 1 (1 to 1) | 40 (40 to 40) | 100 (100 to 100) | 5 (5 to 5) |" in text
    assert "| ratio on the same problem | 0.500 (0.500 to 0.500) |" in text
    assert "2 problems with 3 branches (median), 2 rounds." in text
