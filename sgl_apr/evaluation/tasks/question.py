"""Open questions as methods ask them of a model that follows instructions; nothing knows whether an answer is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from sgl_apr.engine.base import Engine
from sgl_apr.evaluation.tasks.chat_template import ChatTemplate, chat_template_for
from sgl_apr.methods.graph_operations import Aggregate, Generate, Graph, KeepBest, Refine, Score
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.task import Task

ANSWER = re.compile(r"^\W*answer\W*:[\s*]*(\S.*?)[\s*.]*$", re.IGNORECASE | re.MULTILINE)
POINT = re.compile(r"^\s*(\d+)[.)]\s*(\S.*?)\s*$", re.MULTILINE)
SCORE = re.compile(r"score\D*(\d+)", re.IGNORECASE)
CHOICE = re.compile(r"choice\D*(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Draft:
    """How far an answer has come: a plan of it, and then itself."""

    question: str
    plan: str = ""
    text: str = ""


class QuestionTask(Task[str, Draft]):
    """Prompts are those of the papers, in other words. chat: how the model is spoken to, by its tokenizer if left out."""

    name = "question"
    max_tokens = 256
    step = 128
    thoughts = 2  # a plan, an answer
    ends = (
        'Think step by step. Then say the answer, in a few words, in a last line that begins with "Answer:".'
    )

    def __init__(self, engine: Engine, chat: ChatTemplate | None = None) -> None:
        super().__init__(engine)
        self.chat = chat or chat_template_for(engine.tokenizer)

    def chat_turn(self, text: str, *, first: bool = True) -> str:
        return self.chat.turn(text, first=first)

    def ask(self, problem: str) -> Prompt:
        return Prompt(self.prompt(problem))

    def prompt(self, problem: str, instruction: str = "") -> str:
        return self.chat_turn("\n".join(filter(None, (problem, self.ends, instruction))))

    def answer(self, text: str) -> str:
        """What the last line says that begins with "Answer:"; all of a reply that has none.

        >>> QuestionTask.answer(None, "7 times 6.\\n**Answer:** 42")
        '42'
        """
        found = ANSWER.findall(text)
        return str(found[-1] if found else text.strip())

    # Best of N: whether an answer is right, by the probability of "Yes" (Kadavath 2022, arXiv 2207.05221, section 3).

    def judge(self, problem: str) -> Prompt:
        asked = "Is the answer above right? Say Yes or No."
        return Prompt(
            self.chat_turn(asked, first=False),
            tokens=1,
            grammar=self._one_of("Yes", "No"),
            sampling={"temperature": 1.0},
        )

    def judge_score(self, thought: Completion) -> float:
        sure = 1.0 if thought.logprob is None else exp(thought.logprob)
        return sure if thought.text.strip().upper().startswith("Y") else 1 - sure

    # Skeleton-of-Thought (Ning 2023, arXiv 2307.15337, appendix A).

    def skeleton(self, problem: str) -> Prompt:
        asked = (
            "Organize an answer to the question below: write its skeleton only, as a list of points (1., 2., 3., ...), "
            "not what they say. There are 3 to 10 points, each of them 3 to 5 words and no sentence.\n\n"
            f"Question: {problem}"
        )
        return Prompt(f"{self.chat_turn(asked)}1.", tokens=160)

    def points(self, text: str) -> Sequence[str]:
        """
        >>> QuestionTask.points(None, " Warm fur\\n2. Good company.\\nAnd so on.")
        ['Warm fur', 'Good company.']
        """
        found = POINT.findall(f"1.{text}")
        return [point for k, (number, point) in enumerate(found, 1) if int(number) == k]

    def point(self, problem: str, skeleton: str | None, number: int, point: str) -> Prompt:
        asked = f"Write out point {number} in 1 or 2 short sentences, and no other point."
        if skeleton is None:
            return Prompt(
                f"{self.chat_turn(asked, first=False)}{number}. {point}", tokens=self.step, name=point
            )
        shown = (
            "You write one point of an answer to the question below, others write the others.\n\n"
            f"Question: {problem}\n\nSkeleton of the answer:\n1.{skeleton}\n\n{asked}"
        )
        return Prompt(f"{self.chat_turn(shown)}{number}. {point}", tokens=self.step, name=point)

    # Searches, as in creative writing: a plan, then the text (Yao 2023, arXiv 2305.10601, section 4.2).

    def begin(self, problem: str) -> Draft:
        return Draft(problem)

    def propose(self, state: Draft) -> Prompt:
        if not state.plan:
            asked = f"{state.question}\nDo not answer yet: write a plan of the answer, in a few short lines."
            return Prompt(self.chat_turn(asked), tokens=self.step)
        return Prompt(
            self.chat_turn(f"{state.question}\nAnswer by this plan.\n\nPlan:\n{state.plan}\n\n{self.ends}")
        )

    def expand(self, state: Draft, text: str) -> Sequence[Draft]:
        said = text.strip()
        if not said:
            return []
        return [Draft(state.question, state.plan, said) if state.plan else Draft(state.question, said)]

    def solved(self, state: Draft) -> str | None:
        return self.answer(state.text) or None

    def show(self, state: Draft) -> str:
        return state.text or state.plan

    def evaluate(self, state: Draft) -> Prompt:
        what = "this answer" if state.text else "this plan of an answer"
        asked = (
            f"{state.question}\n\nLook at {what}:\n\n{self.show(state)}\n\n"
            'Say in one sentence how good it is, then give it a score from 1 to 10, in a last line like "Score: 5".'
        )
        return Prompt(self.chat_turn(asked), tokens=self.step)

    def value(self, state: Draft, thought: Completion) -> float:
        found = SCORE.findall(thought.text)
        return min(10, int(found[-1])) / 10 if found else 0.0

    def vote(self, problem: str, texts: Sequence[str]) -> Prompt:
        shown = "\n\n".join(f"Choice {k}:\n{text}" for k, text in enumerate(texts, 1))
        asked = (
            f"{problem}\n\n{shown}\n\nWhich is the best? Say briefly what is good and bad about each, then conclude in a "
            'last line like "The best choice is 1".'
        )
        return Prompt(self.chat_turn(asked), tokens=self.step)

    def choice(self, text: str, count: int) -> int | None:
        found = CHOICE.findall(text)
        return int(found[-1]) - 1 if found and 1 <= int(found[-1]) <= count else None

    # Thinkers that read each other: past first, then the others, then its own (Rodionov 2025, arXiv 2504.06261, 3.2).

    def shared_context_prompt(
        self, problem: str, own: str, others: Sequence[str], past: str = ""
    ) -> tuple[str, Prompt]:
        told = (
            "Several of you work on this at once, and each sees what the others have written so far. Share the work, use "
            "what another has found, and leave what another is doing. Any of you may say the answer, for all."
        )
        shown = {"Past steps": past, "Work of others": "\n\n".join(filter(None, others))}
        parts = [f"### {name}\n\n{text.strip()}\n\n" for name, text in shown.items() if text.strip()]
        heading = ["### Own work\n\n"] if parts else []
        return "".join([self.prompt(problem, told), *parts, *heading, own]), Prompt()

    def has_answer(self, text: str) -> bool:
        return bool(ANSWER.search(text))

    def program(self, problem: str) -> tuple[str, str]:
        """What stands behind the last blank line is the question, about all before it; of one paragraph, about itself.

        >>> QuestionTask.program(None, "A long story.\\n\\nIt ends.\\n\\nHow?")
        ('How?', 'A long story.\\n\\nIt ends.')
        """
        text, _, question = problem.strip().rpartition("\n\n")
        return question, text or question

    # Graph of Thoughts, as in merging documents (Besta 2023, arXiv 2308.09687, section 5.4).

    def graph(self, problem: str) -> Graph:
        """Five answers, the best three of which become one, which is gone over once more."""

        def merge(drafts: Sequence[Draft]) -> Prompt:
            return self._asked(problem, "Make one better answer of these", [draft.text for draft in drafts])

        def better(draft: Draft) -> Prompt:
            return self._asked(problem, "Improve this answer", [draft.text])

        def read(_: object, text: str) -> Sequence[Draft]:
            return [Draft(problem, text=text.strip())] if text.strip() else []

        return {
            "draft": Generate(ask=lambda _: self.ask(problem), read=read, k=5),
            "score": Score(score=self.evaluate, read=self.value, k=3, depends_on=("draft",)),
            "best": KeepBest(n=3, depends_on=("score",)),
            "merge": Aggregate(ask=merge, read=read, depends_on=("best",)),
            "improve": Refine(ask=better, read=read, depends_on=("merge",)),
        }

    def _asked(self, problem: str, what: str, texts: Sequence[str]) -> Prompt:
        shown = "\n\n".join(f"{k}. {text}" for k, text in enumerate(texts, 1))
        return Prompt(self.chat_turn(f"{problem}\n\n{what}:\n\n{shown}\n\n{self.ends}"))

    def _one_of(self, *words: str) -> str:
        begins = "root ::=" if self.engine.grammar_backend == "xgrammar" else "start:"
        return f"{begins} " + " | ".join(f'"{word}"' for word in words) + "\n"
