"""Datasets of `reasoning-gym` as benchmarks; the library generates and judges in a process of its own."""

from __future__ import annotations

from functools import partial

from sgl_apr.errors import AprError, require_extra
from sgl_apr.evaluation.benchmarks.base import Benchmark, Case
from sgl_apr.evaluation.tasks.countdown.problems import Split
from sgl_apr.evaluation.tasks.json_worker import JsonWorker
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.evaluation.tasks.reply_text import last_between

ANSWER_TAGS = ("<answer>", "</answer>")
GENERATE_TIMEOUT_S, JUDGE_TIMEOUT_S = 900.0, 30.0  # for all problems, and for one answer
TRAIN_SEED_OFFSET = 1 << 31  # added to the seed of the split "train"
# One thread: the sandboxed judge may not start more, and would wait for them. A fixed hash seed: some datasets iterate
# over sets, and would generate other problems from the same seed.
JUDGE_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
JUDGE = JsonWorker(
    "sgl_apr.evaluation.benchmarks.gym_judge", timeout_s=JUDGE_TIMEOUT_S, environment=JUDGE_ENVIRONMENT
)


class GymTask(QuestionTask):
    """Answers stand between tags, as in the library's own evaluations, and may have several lines."""

    name = "gym"
    max_tokens = 512
    comparable = True
    answer_instruction = (
        "Think step by step. Then put the answer, and nothing else, between <answer> and </answer>."
    )

    def answer(self, text: str) -> str:
        """The text between the last pair of tags; without tags, as for any question.

        Examples:
            >>> GymTask.answer(None, "So: <answer>\\n1 2\\n2 1\\n</answer>")
            '1 2\\n2 1'
        """
        tagged = last_between(*ANSWER_TAGS, text)
        return QuestionTask.answer(self, text) if tagged is None else tagged

    def has_answer(self, text: str) -> bool:
        return last_between(*ANSWER_TAGS, text) is not None or super().has_answer(text)


def gym(name: str, limit: int, split: Split = "test", seed: int = 0) -> Benchmark:
    """A dataset of reasoning-gym, at its default difficulty.

    Args:
        name: Name of the dataset.
        limit: Number of problems.
        split: "test", or "train" to choose settings by.
        seed: Seed of the problems.

    Raises:
        AprError: If there is no such dataset, or it does not generate the problems.
        MissingExtra: If reasoning-gym is not installed.
    """
    require_extra("reasoning_gym", "gym", f"gym:{name} needs reasoning-gym")
    dataset = (name, seed + TRAIN_SEED_OFFSET * (split == "train"), limit)
    response = JUDGE.call("problems", *dataset, timeout_s=GENERATE_TIMEOUT_S)
    if response is None:
        raise AprError(f"gym:{name} did not generate {limit} problems in {GENERATE_TIMEOUT_S:g} s")
    if "error" in response:
        raise AprError(response["error"])
    cases = [Case(f"{name} {dataset[1]}-{k}", *problem) for k, problem in enumerate(response["problems"])]
    return Benchmark(f"gym:{name}", cases, GymTask, partial(_is_correct, dataset))


def _is_correct(dataset: tuple[str, int, int], case: Case, answer: str) -> bool:
    """Whether the dataset gives an answer the full score; near misses get a part of it."""
    score = JUDGE.call("score", *dataset, int(case.name.rpartition("-")[2]), answer)
    if not isinstance(score, float):
        raise AprError(f"the judge of gym:{dataset[0]} has ended: {score}")
    return score >= 1
