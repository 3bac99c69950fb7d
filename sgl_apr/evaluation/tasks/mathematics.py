"""Mathematics as methods ask for it; what an answer says is found out by `math-verify`, in a process of its own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from sgl_apr.engine.base import Engine
from sgl_apr.evaluation.tasks.chat_template import ChatTemplate
from sgl_apr.evaluation.tasks.json_worker import JsonWorker
from sgl_apr.evaluation.tasks.question import ANSWER, QuestionTask


class MathTask(QuestionTask):
    """Questions whose answer is a formula: what a reply has in a box, its last formula, or its line "Answer:".

    answers: those that are right, by question, as far as they are known; no method sees them.
    """

    name = "mathematics"
    max_tokens = 512
    ends = "Think step by step, and put the answer into \\boxed{}."

    def __init__(
        self, engine: Engine, chat: ChatTemplate | None = None, *, answers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(engine, chat)
        self.answers = answers or {}

    def answer(self, text: str) -> str:
        named = ANSWER.findall(text)
        return str(FORMULA_WORKER.call("found", text) or (named[-1] if named else ""))

    def has_answer(self, text: str) -> bool:
        return "\\boxed{" in text or super().has_answer(text)

    def vote_key(self, answer: str) -> Hashable:
        return MathAnswer(answer)

    def verify(self, problem: str, answer: str) -> bool | None:
        right = self.answers.get(problem)
        return None if right is None else MathAnswer(right) == MathAnswer(answer)


@dataclass(frozen=True, eq=False, slots=True)
class MathAnswer:
    """An answer, which equals all that say the same: 0.5 and 1/2, x + 1 and 1 + x."""

    text: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MathAnswer) and (self.text == other.text or _equal(self.text, other.text))

    def __hash__(self) -> int:
        return 0  # what says the same may look like anything


class FormulaWorker(JsonWorker):
    """The process that runs `sgl_apr.evaluation.tasks.formula_worker`."""

    def __init__(self) -> None:
        super().__init__("sgl_apr.evaluation.tasks.formula_worker")


FORMULA_WORKER = FormulaWorker()


@lru_cache(maxsize=1 << 14)
def _equal(one: str, other: str) -> bool:
    return bool(FORMULA_WORKER.call("equal", one, other))
