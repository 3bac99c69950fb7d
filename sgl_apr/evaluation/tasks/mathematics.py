"""Mathematics as a task: answers are formulas, which `math-verify` reads and compares in a process of its own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import require_extra
from sgl_apr.evaluation.tasks.json_worker import JsonWorker
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.evaluation.tasks.reply_text import answer_lines
from sgl_apr.methods.chat_tasks import Chat


class MathTask(QuestionTask):
    """Questions whose answer is a formula.

    The answer of a reply is its last box, or else its last formula, or else its line "Answer:".

    Args:
        engine: Where the model decodes.
        chat: How the model is addressed; by default chosen by its tokenizer.
        answers: Correct answers by question, where they are known; methods do not see them.
    """

    name = "mathematics"
    max_tokens = 512
    comparable = True
    answer_instruction = "Think step by step, and put the answer into \\boxed{}."

    def __init__(
        self, engine: Engine, chat: Chat | None = None, *, answers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(engine, chat)
        self.answers = answers or {}

    def answer(self, text: str) -> str:
        lines = answer_lines(text)
        return str(FORMULA_WORKER.call("extract_answer", text) or (lines[-1] if lines else ""))

    def has_answer(self, text: str) -> bool:
        return "\\boxed{" in text or super().has_answer(text)

    def vote_key(self, answer: str) -> Hashable:
        return MathAnswer(answer)

    def verify(self, problem: str, answer: str) -> bool | None:
        correct = self.answers.get(problem)
        return None if correct is None else MathAnswer(correct) == MathAnswer(answer)


@dataclass(frozen=True, eq=False, slots=True)
class MathAnswer:
    """An answer that equals every answer of the same value: 0.5 and 1/2, x + 1 and 1 + x."""

    text: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MathAnswer) and (self.text == other.text or _match(self.text, other.text))

    def __hash__(self) -> int:
        return 0  # equal answers may be written in any way


class FormulaWorker(JsonWorker):
    """The process that runs `sgl_apr.evaluation.tasks.formula_worker`."""

    def __init__(self) -> None:
        super().__init__("sgl_apr.evaluation.tasks.formula_worker")

    def call(self, name: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        require_extra("math_verify", "eval", "answers of mathematics need math-verify")
        return super().call(name, *arguments, timeout_s=timeout_s)


FORMULA_WORKER = FormulaWorker()


@lru_cache(maxsize=1 << 14)
def _match(one: str, other: str) -> bool:
    return bool(FORMULA_WORKER.call("answers_match", one, other))
