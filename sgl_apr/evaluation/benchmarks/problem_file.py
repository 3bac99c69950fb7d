"""Mathematics problems of a file with their answers, in the style of AIME and MATH, as a benchmark."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.evaluation.benchmarks.base import Benchmark, Case
from sgl_apr.evaluation.tasks.mathematics import MathAnswer, MathTask
from sgl_apr.trajectory.jsonl import read_lines

EXPECTED_LINE = '{"problem" or "question": str, "answer": str, "id"?: str, "level"?: int}'


def problem_file(path: str | Path, limit: int) -> Benchmark:
    """The first problems of a file with one JSON object per line.

    Args:
        path: Lines `{"problem": ..., "answer": ..., "id": ..., "level": ...}`. Without an id the name is a digest of the
            text. The size is the number in the level ("Level 5" is 5), or 0.
        limit: Problems at most.

    Raises:
        AprError: If the file cannot be read, or a line is not such an object; the message names it.
    """
    path = Path(path)
    cases, answers = list[Case](), dict[str, str]()
    for number, data in islice(read_lines(path, expected=EXPECTED_LINE), limit):
        try:
            case, answer = _read(data)
        except (ValueError, KeyError):
            raise AprError(f"{path}, line {number}: expected {EXPECTED_LINE}") from None
        cases.append(case)
        answers[case.name] = answer

    def is_correct(case: Case, answer: str) -> bool:
        return MathAnswer(answers[case.name]) == MathAnswer(answer)

    return Benchmark(path.stem, cases, MathTask, is_correct)


def _read(data: Mapping[str, Any]) -> tuple[Case, str]:
    problem = data.get("problem", data.get("question"))
    answer = data["answer"]
    if not isinstance(problem, str) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError
    name = str(data.get("id", sha256(problem.encode(errors="replace")).hexdigest()[:12]))
    level = re.search(r"\d+", str(data.get("level", "")))
    return Case(name, problem, int(level[0]) if level else 0), str(answer)
