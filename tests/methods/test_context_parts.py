"""Long texts that are read in parts: what each sub-call sees, what the answer sees, and where that ends."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.benchmarks.registry import benchmark
from sgl_apr.methods.context_parts import split_text
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.task import ProgramTask

LINES = [f"line {k} has {k * 7 % 100} coins." for k in range(1, 41)]
TEXT = "\n".join(LINES)


class Reading(ProgramTask[str]):
    name = "reading"

    def program(self, problem: str) -> tuple[str, str]:
        return problem, TEXT

    def answer(self, text: str) -> str:
        return text.strip()

    def chat_turn(self, text: str, *, first: bool = True) -> str:
        return f"<{text}>"


def read(script: Any, **options: Any) -> tuple[MethodResult, list[str]]:
    engine = apr.ScriptedEngine(script)
    options = {
        "seed": 0,
        "budget": apr.Budget(tokens=1 << 16),
        "part_tokens": 200,
        "reply_tokens": 60,
        **options,
    }
    found = asyncio.run(method("recursive")(engine, "What has line 23?", task=Reading(engine), **options))
    assert not engine.active
    assert apr.Trajectory.from_json(found.trajectory.to_json()) == found.trajectory
    return found, [bytes(r.input_ids).decode() for r in engine.requests if r.max_tokens]


def finds(request: apr.Request, prompt: str) -> str:
    """A model that notes the line that it is asked about, and nothing where its part has another."""
    found = re.search(r"line 23 has (\d+) coins", prompt)
    return (found[0] if "Write down" in prompt else found[1]) if found else "nothing"


def test_each_sub_call_sees_one_part_and_the_answer_sees_the_notes():
    result, prompts = read(finds)
    assert (result.answer, result.label) == (str(23 * 7 % 100), "recursive-by-parts")
    *parts, answer = prompts
    assert len(parts) == len(split_text(TEXT, 200, apr.ByteTokenizer())) > 4
    assert [line for part in parts for line in part.splitlines() if line.startswith("line ")] == LINES
    assert all(part.count("What has line 23?") == 1 for part in parts)
    assert "line 23 has 61 coins" in answer
    assert "line 22 has" not in answer
    sub_calls = result.trajectory.blocks[0].branches
    assert len(sub_calls) == len(parts)
    assert result.metrics.critical_path < result.metrics.total / 3, "the parts are read in parallel"


def test_notes_that_are_too_long_are_read_in_parts_too():
    levels: list[int] = []

    def script(request: apr.Request, prompt: str) -> str:
        if found := re.search(r"Part \d+ of (\d+) of a text", prompt):
            levels.append(int(found[1]))
            return "about coins: " + "x" * 30
        return "done"

    result, _ = read(script)
    assert result.answer == "done"
    assert sorted(set(levels), reverse=True) == list(dict.fromkeys(levels)), "each level has fewer parts"
    assert len(set(levels)) >= 2


def test_notes_that_do_not_become_shorter_end_the_reading():
    result, prompts = read(lambda request, prompt: "y" * 300, reply_tokens=300)
    assert len(prompts) < 20
    assert result.answer.startswith("y")


def test_a_short_text_is_asked_about_at_once():
    result, prompts = read(finds, part_tokens=5000)
    assert (result.answer, len(prompts)) == ("61", 1)


def test_no_limit_is_exceeded():
    result, _ = read(finds, budget=apr.Budget(tokens=700))
    assert result.metrics.total <= 700
    assert "tokens" in {limit.limit for limit in result.trajectory.limits}


def test_text_is_no_control_token_and_a_long_line_is_split():
    assert split_text("a" * 25 + "\nb", 10, apr.ByteTokenizer()) == ["a" * 10, "a" * 10, "aaaaa\nb"]
    assert split_text("", 10, apr.ByteTokenizer()) == []


@pytest.mark.parametrize("wrong", [{"part_tokens": 0}, {"part_tokens": -5}, {"reply_tokens": 0}])
def test_wrong_sizes_are_refused(wrong: dict[str, int]):
    with pytest.raises(apr.AprError, match="expected at least 1"):
        read(finds, **wrong)


def test_a_ledger_has_a_budget_that_pays_for_reading_it():
    assert benchmark("ledger:4k", 1, "test", 0).budget.tokens >= 8000
