"""Ledgers: one right answer each, the same for the same seed, and of the size that their name says."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from typing import Any, get_args

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.benchmarks.registry import benchmark
from sgl_apr.evaluation.tasks.ledger import LedgerKind, LedgerTask, generate_ledgers
from sgl_apr.methods.registry import method

LINE = re.compile(r"\[(\d+)\] (\w+) paid (\w+) (\d+) coins for \w+\.")


def solve(text: str) -> str:
    """The answer by the text alone."""
    lines, question = text.rsplit("\n\n", 1)
    rows = [(int(n), payer, int(coins)) for n, payer, _, coins in LINE.findall(lines)]
    assert len(rows) == lines.count("\n") + 1
    if found := re.search(r"line (\d+)", question):
        return str(next(coins for n, _, coins in rows if n == int(found[1])))
    totals = Counter[str]()
    for _, payer, coins in rows:
        totals[payer] += coins
    if "largest" in question:
        (first, most), *others = totals.most_common()
        assert all(total < most for _, total in others)
        return first
    person = re.findall(r"did (\w+) pay", question)[0]
    own = [coins for _, payer, coins in rows if payer == person]
    return str(len(own) if "times" in question else sum(own))


@pytest.mark.parametrize("lines", [1, 3, 40, 250])
def test_answers_are_those_of_the_text(lines: int):
    problems = list(generate_ledgers(12, lines, seed=3))
    assert [problem.kind for problem in problems] == list(get_args(LedgerKind)) * 3
    assert [problem.answer for problem in problems] == [solve(problem.text) for problem in problems]
    assert problems == list(generate_ledgers(12, lines, seed=3))
    assert problems != list(generate_ledgers(12, lines, seed=4))
    assert problems[:5] == list(generate_ledgers(5, lines, seed=3))


def test_the_benchmark():
    small = benchmark("ledger:4k", 8)
    assert {case.size for case in small.cases} == {250}
    assert all(small.is_correct(case, solve(case.problem)) for case in small.cases)
    assert not any(small.is_correct(case, "") for case in small.cases)
    train = benchmark("ledger:4k", 8, split="train")
    assert not {case.problem for case in small.cases} & {case.problem for case in train.cases}
    for name in ("ledger", "ledger:4", "ledger:0k", "ledger:xk"):
        with pytest.raises(apr.AprError, match="expected thousands of tokens such as 4k"):
            benchmark(name, 1)
    with pytest.raises(apr.AprError, match="count=0, lines=1"):
        list(generate_ledgers(0, 1))


def test_a_model_that_reads_by_programs():
    """The program counts over all of the context, which no prompt of the model shows."""
    problem = next(p for p in generate_ledgers(8, 250) if p.kind == "sum")
    program = (
        "```repl\nimport re\ntotal = sum(int(c) for p, c in re.findall(r'\\] (\\w+) paid \\w+ (\\d+)', context) "
        f"if p == {problem.person!r})\nFINAL(total)\n```"
    )
    prompts = list[str]()

    def script(request: apr.Request, prompt: str) -> Any:
        prompts.append(prompt)
        return program

    engine = apr.ScriptedEngine(script)
    result = asyncio.run(
        method("recursive")(
            engine, problem.text, task=LedgerTask(engine), allow_code=True, budget={"tokens": 4000}
        )
    )
    assert result.answer == problem.answer
    assert len(prompts) == 1
    assert len(prompts[0]) < len(problem.text) / 2
    engine = apr.ScriptedEngine(lambda request, prompt: f"Answer: {solve(prompt.split('?')[0] + '?')}")
    result = asyncio.run(
        method("sequential")(engine, problem.text, task=LedgerTask(engine), budget={"tokens": 9000})
    )
    assert result.answer == problem.answer
