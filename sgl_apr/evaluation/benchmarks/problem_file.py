"""Problems of a file with their answers, in the style of AIME and MATH, as a benchmark; formulas are compared elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.evaluation.benchmarks.base import Benchmark, Case
from sgl_apr.evaluation.tasks.mathematics import MathAnswer, MathTask

EXPECTED_LINE = '{"problem" or "question": str, "answer": str, "id"?: str, "level"?: int}'


def problem_file(path: str | Path, limit: int) -> Benchmark:
    """The first problems of a file with a JSON object in each line; raises `AprError` that names another line.

    A problem without an id has one by its text; its size is the number in its level ("Level 5"), 0 if it has none.
    """
    path = Path(path)
    cases, answers = list[Case](), dict[str, str]()
    try:
        with path.open(encoding="utf-8") as file:
            lines = ((number, text) for number, text in enumerate(file, 1) if text.strip())
            for number, text in islice(lines, limit):
                try:
                    case, answer = _read(json.loads(text))
                except (ValueError, KeyError, AttributeError):
                    raise AprError(f"{path}, line {number}: expected {EXPECTED_LINE}") from None
                cases.append(case)
                answers[case.name] = answer
    except (OSError, UnicodeDecodeError) as error:
        raise AprError(f"cannot read {path}: {error}") from None
    return Benchmark(
        path.stem, cases, MathTask, lambda case, said: MathAnswer(answers[case.name]) == MathAnswer(said)
    )


def _read(data: Mapping[str, Any]) -> tuple[Case, str]:
    problem = data.get("problem", data.get("question"))
    answer = data["answer"]
    if not isinstance(problem, str) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError
    name = str(data.get("id", sha256(problem.encode(errors="replace")).hexdigest()[:12]))
    level = re.search(r"\d+", str(data.get("level", "")))
    return Case(name, problem, int(level[0]) if level else 0), str(answer)
