"""Open questions as a task, for a model that follows instructions; nothing verifies an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.evaluation.tasks.chat_template import chat_template_for
from sgl_apr.evaluation.tasks.reply_text import answer_lines, last_number_after, numbered_points
from sgl_apr.methods.chat_tasks import Chat
from sgl_apr.methods.graph_operations import Aggregate, Generate, Graph, KeepBest, Refine, Score
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.task import (
    AggregationTask,
    CollaborativeTask,
    GraphTask,
    ProgramTask,
    SelfJudgedTask,
    SkeletonTask,
    ValuedSearchTask,
    VotedSearchTask,
)
from sgl_apr.trajectory.worker_groups import GroupKind

WORKER_INSTRUCTIONS: Mapping[GroupKind, str] = {
    "group_think": (
        "Several thinkers work on this at the same time, each under its own name. While you write, you see every word that the "
        "others have written so far. Work together: leave what another is doing, use what another has found, and add what is "
        "missing. Any of you may say the answer, for all."
    ),
    "hogwild": (
        "You work on this together with other assistants, and all of you write at the same time. A step begins with the name of "
        "who writes it and its number, such as **Alice [1]:**, and ends with an empty line. You see the steps that any of you "
        "has finished, then what the others are writing now, then your own step. If you are doing what another is doing, stop "
        "and do something else. Use what another has found. Any of you may say the answer, for all."
    ),
}


@dataclass(frozen=True, slots=True)
class Draft:
    """An answer in the making: first a plan, then the text."""

    question: str
    plan: str = ""
    text: str = ""


class QuestionTask(
    AggregationTask[str],
    SelfJudgedTask[str],
    SkeletonTask[str],
    ValuedSearchTask[str, Draft],
    VotedSearchTask[str, Draft],
    GraphTask[str, Draft],
    CollaborativeTask[str],
    ProgramTask[str],
):
    """Open questions, with prompts after those of the papers.

    Args:
        engine: Where the model decodes.
        chat: How the model is addressed; by default chosen by its tokenizer.
    """

    name = "question"
    max_tokens = 256
    step_tokens = 128
    max_steps = 2  # a plan and an answer
    comparable = False  # open questions: two replies say the same in other words
    answer_instruction = (
        'Think step by step. Then say the answer, in a few words, in a last line that begins with "Answer:".'
    )

    def __init__(self, engine: Engine, chat: Chat | None = None) -> None:
        super().__init__(engine)
        self.chat: Chat = chat or chat_template_for(engine.tokenizer)

    def chat_turn(self, text: str, *, first: bool = True) -> str:
        return self.chat.turn(text, first=first)

    def prompt(self, problem: str) -> Prompt:
        return self.turn_prompt(self._message(problem))

    def prompt_text(self, problem: str, instruction: str = "") -> str:
        return self.chat_turn(self._message(problem, instruction))

    def turn_prompt(self, message: str, *, first: bool = True, begin: str = "", **options: Any) -> Prompt:
        """The prompt of a user's message.

        Args:
            message: The message. No control token is in it, however it is spelled.
            first: Whether nothing comes before it.
            begin: How the reply begins, a text without control tokens too.
            options: Further fields of the prompt.
        """
        text = f"{self.chat_turn(message, first=first)}{begin}"
        return Prompt(text, quoted=(message, begin, *self.chat.quoted), **options)

    def _message(self, problem: str, instruction: str = "") -> str:
        return "\n".join(filter(None, (problem, self.answer_instruction, instruction)))

    def answer(self, text: str) -> str:
        """What the last line "Answer:" says; the complete reply if there is no such line.

        Examples:
            >>> QuestionTask.answer(None, "7 times 6.\\n**Answer:** 42")
            '42'
        """
        lines = answer_lines(text)
        return lines[-1] if lines else text.strip()

    # Best of N: whether an answer is right, by the probability of "Yes" (Kadavath 2022, arXiv 2207.05221, section 3).

    def judge_prompt(self, problem: str) -> Prompt:
        message = "Is the answer above right? Say Yes or No."
        return self.turn_prompt(
            message,
            first=False,
            tokens=1,
            grammar=self._one_of("Yes", "No"),
            sampling={"temperature": 1.0},
        )

    def judge_score(self, completion: Completion) -> float:
        sure = 1.0 if completion.logprob is None else exp(completion.logprob)
        return sure if completion.text.strip().upper().startswith("Y") else 1 - sure

    # PaCoRe (Hu 2026, arXiv 2601.05593, section 3.1) and RSA (Venkatraman 2025, arXiv 2509.26626, section 3).

    def aggregation_prompt(self, problem: str, replies: Sequence[str]) -> Prompt:
        shown = "\n\n".join(f"Reply {k}:\n{text}" for k, text in enumerate(replies, 1))
        message = (
            f"{problem}\n\nBelow are earlier replies to this. Some may be wrong or incomplete. Compare them, keep what is "
            f"right, mend what is wrong, and write your own reply.\n\n{shown}\n\n{self.answer_instruction}"
        )
        return self.turn_prompt(message)

    # Skeleton-of-Thought (Ning 2023, arXiv 2307.15337, appendix A).

    def skeleton_prompt(self, problem: str) -> Prompt:
        message = (
            "Organize an answer to the question below: write its skeleton only, as a list of points (1., 2., 3., ...), "
            "not what they say. There are 3 to 10 points, each of them 3 to 5 words and no sentence.\n\n"
            f"Question: {problem}"
        )
        return self.turn_prompt(message, begin="1.", tokens=160)

    def points(self, text: str) -> Sequence[str]:
        """The numbered points of a skeleton, up to the first gap in the numbers.

        Examples:
            >>> QuestionTask.points(None, " Warm fur\\n2. Good company.\\nAnd so on.")
            ['Warm fur', 'Good company.']
        """
        points = numbered_points(f"1.{text}")
        return [point for k, (number, point) in enumerate(points, 1) if number.lstrip("0") == f"{k}"]

    def point_prompt(self, problem: str, skeleton: str | None, number: int, point: str) -> Prompt:
        message = f"Write out point {number} in 1 or 2 short sentences, and no other point."
        if skeleton is None:
            return self.turn_prompt(
                message, first=False, begin=f"{number}. {point}", tokens=self.step_tokens, name=point
            )
        shown = (
            "You write one point of an answer to the question below, others write the others.\n\n"
            f"Question: {problem}\n\nSkeleton of the answer:\n1.{skeleton}\n\n{message}"
        )
        return self.turn_prompt(shown, begin=f"{number}. {point}", tokens=self.step_tokens, name=point)

    # Searches, as in creative writing: a plan, then the text (Yao 2023, arXiv 2305.10601, section 4.2).

    def initial_state(self, problem: str) -> Draft:
        return Draft(problem)

    def proposal_prompt(self, state: Draft) -> Prompt:
        if not state.plan:
            message = (
                f"{state.question}\nDo not answer yet: write a plan of the answer, in a few short lines."
            )
            return self.turn_prompt(message, tokens=self.step_tokens)
        return self.turn_prompt(
            f"{state.question}\nAnswer by this plan.\n\nPlan:\n{state.plan}\n\n{self.answer_instruction}"
        )

    def expand(self, state: Draft, text: str) -> Sequence[Draft]:
        stripped = text.strip()
        if not stripped:
            return []
        return [
            Draft(state.question, state.plan, stripped) if state.plan else Draft(state.question, stripped)
        ]

    def solution(self, state: Draft) -> str | None:
        return self.answer(state.text) or None

    def show(self, state: Draft) -> str:
        return state.text or state.plan

    def evaluate(self, state: Draft) -> Prompt:
        what = "this answer" if state.text else "this plan of an answer"
        message = (
            f"{state.question}\n\nLook at {what}:\n\n{self.show(state)}\n\n"
            'Say in one sentence how good it is, then give it a score from 1 to 10, in a last line like "Score: 5".'
        )
        return self.turn_prompt(message, tokens=self.step_tokens)

    def value(self, state: Draft, completion: Completion) -> float:
        score = last_number_after("score", completion.text)
        return 0.0 if score is None else min(10, score) / 10

    def vote_prompt(self, problem: str, texts: Sequence[str]) -> Prompt:
        shown = "\n\n".join(f"Choice {k}:\n{text}" for k, text in enumerate(texts, 1))
        message = (
            f"{problem}\n\n{shown}\n\nWhich is the best? Say briefly what is good and bad about each, then conclude in a "
            'last line like "The best choice is 1".'
        )
        return self.turn_prompt(message, tokens=self.step_tokens)

    def choice(self, text: str, count: int) -> int | None:
        number = last_number_after("choice", text)
        return number - 1 if number is not None and 1 <= number <= count else None

    # Thinkers that read each other: past first, then the others, then its own (Rodionov 2025, arXiv 2504.06261, 3.2).

    def shared_context_prompt(
        self, problem: str, own: str, others: Sequence[str], past: str = ""
    ) -> tuple[str, Prompt]:
        instruction = (
            "Several of you work on this at once, and each sees what the others have written so far. Share the work, use "
            "what another has found, and leave what another is doing. Any of you may say the answer, for all."
        )
        shown = {"Past steps": past, "Work of others": "\n\n".join(filter(None, others))}
        parts = [f"### {name}\n\n{text.strip()}\n\n" for name, text in shown.items() if text.strip()]
        heading = ["### Own work\n\n"] if parts else []
        text = "".join([self.prompt_text(problem, instruction), *parts, *heading, own])
        return text, Prompt(quoted=(self._message(problem, instruction), *parts, own, *self.chat.quoted))

    def worker_prompts(self, problem: str, workers: int, kind: GroupKind) -> tuple[str, Sequence[Prompt]]:
        """A message in the style of the papers (Group Think: Hsu 2025, arXiv 2505.11107; Hogwild!: Rodionov 2025, arXiv
        2504.06261, appendix C), and the name with which each worker opens its reply."""
        _, prompts = super().worker_prompts(problem, workers, kind)
        message = self._message(problem, WORKER_INSTRUCTIONS[kind])
        quoted = (message, *self.chat.quoted)
        return self.chat_turn(message), [replace(prompt, quoted=quoted) for prompt in prompts]

    def has_answer(self, text: str) -> bool:
        return bool(answer_lines(text))

    def program(self, problem: str) -> tuple[str, str]:
        """The last paragraph is the question about the paragraphs before it; a single paragraph is both.

        Examples:
            >>> QuestionTask.program(None, "A long story.\\n\\nIt ends.\\n\\nHow?")
            ('How?', 'A long story.\\n\\nIt ends.')
        """
        text, _, question = problem.strip().rpartition("\n\n")
        return question, text or question

    # Graph of Thoughts, as in merging documents (Besta 2023, arXiv 2308.09687, section 5.4).

    def graph(self, problem: str) -> Graph:
        """Draft five answers, merge the best three into one, and improve that once."""

        def merge(drafts: Sequence[Draft]) -> Prompt:
            return self._list_prompt(
                problem, "Make one better answer of these", [draft.text for draft in drafts]
            )

        def better(draft: Draft) -> Prompt:
            return self._list_prompt(problem, "Improve this answer", [draft.text])

        def read(_: object, text: str) -> Sequence[Draft]:
            return [Draft(problem, text=text.strip())] if text.strip() else []

        return {
            "draft": Generate(prompt=lambda _: self.prompt(problem), read=read, k=5),
            "score": Score(score=self.evaluate, read=self.value, k=3, depends_on=("draft",)),
            "best": KeepBest(n=3, depends_on=("score",)),
            "merge": Aggregate(prompt=merge, read=read, depends_on=("best",)),
            "improve": Refine(prompt=better, read=read, depends_on=("merge",)),
        }

    def _list_prompt(self, problem: str, what: str, texts: Sequence[str]) -> Prompt:
        shown = "\n\n".join(f"{k}. {text}" for k, text in enumerate(texts, 1))
        return self.turn_prompt(f"{problem}\n\n{what}:\n\n{shown}\n\n{self.answer_instruction}")

    def _one_of(self, *words: str) -> str:
        begins = "root ::=" if self.engine.grammar_backend == "xgrammar" else "start:"
        return f"{begins} " + " | ".join(f'"{word}"' for word in words) + "\n"
