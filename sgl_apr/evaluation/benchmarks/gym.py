"""Any dataset of `reasoning-gym` as a benchmark; the library runs in a process of its own, and judges there."""

from __future__ import annotations

import re
from functools import partial
from importlib.util import find_spec

from sgl_apr.errors import AprError
from sgl_apr.evaluation.benchmarks.base import Benchmark, Case
from sgl_apr.evaluation.tasks.countdown.problems import Split
from sgl_apr.evaluation.tasks.json_worker import JsonWorker
from sgl_apr.evaluation.tasks.question import QuestionTask

ANSWER_TAGS = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
GENERATE_TIMEOUT_S, JUDGE_TIMEOUT_S = (
    900.0,
    30.0,
)  # longest until all problems are made, and until one answer is judged
TRAIN_SEED_OFFSET = 1 << 31  # added to the seed of problems that settings are chosen by
# One thread, or a judge that may start none waits for others; one order of sets, or a seed makes different problems.
JUDGE_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
JUDGE = JsonWorker(
    "sgl_apr.evaluation.benchmarks.gym_judge", timeout_s=JUDGE_TIMEOUT_S, environment=JUDGE_ENVIRONMENT
)


class GymTask(QuestionTask):
    """Its answers may have several lines, and stand between tags, as in the library's own evaluations."""

    name = "gym"
    max_tokens = 512
    ends = "Think step by step. Then put the answer, and nothing else, between <answer> and </answer>."

    def answer(self, text: str) -> str:
        """
        >>> GymTask.answer(None, "So: <answer>\\n1 2\\n2 1\\n</answer>")
        '1 2\\n2 1'
        """
        found = ANSWER_TAGS.findall(text)
        return str(found[-1]) if found else QuestionTask.answer(self, text)

    def has_answer(self, text: str) -> bool:
        return bool(ANSWER_TAGS.search(text)) or super().has_answer(text)


def gym(name: str, limit: int, split: Split = "test", seed: int = 0) -> Benchmark:
    """The dataset of that name, by default as hard as it is there; raises `AprError` for one that there is not."""
    if find_spec("reasoning_gym") is None:
        raise AprError(f"gym:{name} needs reasoning-gym: pip install 'sgl-apr[gym]'")
    made = (name, seed + TRAIN_SEED_OFFSET * (split == "train"), limit)
    found = JUDGE.call("problems", *made, timeout_s=GENERATE_TIMEOUT_S)
    if found is None or "error" in found:
        raise AprError(
            found["error"]
            if found
            else f"gym:{name} has not made {limit} problems in {GENERATE_TIMEOUT_S:g} s"
        )
    cases = [Case(f"{name} {made[1]}-{k}", *problem) for k, problem in enumerate(found["problems"])]
    return Benchmark(f"gym:{name}", cases, GymTask, partial(_is_correct, made))


def _is_correct(made: tuple[str, int, int], case: Case, answer: str) -> bool:
    """Whether the dataset gives an answer all of its points; parts of them are for what is near."""
    score = JUDGE.call("score", *made, int(case.name.rpartition("-")[2]), answer)
    if not isinstance(score, float):
        raise AprError(f"the judge of gym:{made[0]} has ended: {score}")
    return score >= 1
