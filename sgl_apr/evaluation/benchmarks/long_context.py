"""Questions about long texts as a benchmark, for models that read programs or sub-calls into them."""

from __future__ import annotations

from typing import get_args

from sgl_apr.evaluation.benchmarks.base import Benchmark, Case
from sgl_apr.evaluation.tasks.countdown.problems import Split
from sgl_apr.evaluation.tasks.ledger import (
    TOKENS_PER_LINE,
    LedgerKind,
    LedgerTask,
    generate_ledgers,
    lines_of,
)
from sgl_apr.runtime.budget import Budget

ANSWER_TOKENS = 4096  # of the budget, beside those of the text
TRAIN_SEEDS = 1_000_000  # ledgers of these seeds and above are of the split "train"


def ledger(
    size: str,
    limit: int,
    split: Split = "test",
    seed: int = 0,
    kinds: tuple[LedgerKind, ...] = get_args(LedgerKind),
) -> Benchmark:
    """Ledgers of a size: questions of all kinds in turn. The size of a problem is its number of lines.

    Args:
        size: Thousands of tokens, such as "4k".
        limit: Problems at most.
        split: Their split.
        seed: Their seed.
        kinds: What is asked.

    Raises:
        AprError: If it is no such size.
    """
    lines = lines_of(size)
    problems = list(generate_ledgers(limit, lines, seed + TRAIN_SEEDS * (split == "train"), kinds))
    answers = {problem.text: problem.answer for problem in problems}
    cases = [
        Case(f"{problem.kind} {number}", problem.text, lines) for number, problem in enumerate(problems, 1)
    ]

    def is_correct(case: Case, answer: str) -> bool:
        return answers[case.problem] == answer.strip()

    budget = Budget(tokens=ANSWER_TOKENS + 2 * lines * TOKENS_PER_LINE)  # sub-calls pay for what they read
    return Benchmark(f"ledger:{size}", cases, LedgerTask, is_correct, budget)
