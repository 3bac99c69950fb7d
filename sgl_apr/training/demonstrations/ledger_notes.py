"""Demonstrations of reading a long ledger in parts, as `recursive(part_tokens=...)` puts them to a model: notes and answers.

A note quotes the payments that it counts or adds up, each with the total so far, and ends with the value of the part:
"[3] Ada = 1, [17] Ada = 2" for a count, "[3] Ada paid Dan 12 = 12, [17] Ada paid Ben 44 = 56" for a sum. The note of a needle is its
line, "[8] Gina paid Olga 29". A note of notes, and an answer, add their values up, each after the number of its note: "4: 2 = 2, 9: 1 = 3". A
part that says nothing has an empty note.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sgl_apr.evaluation.tasks.chat_template import CHATML
from sgl_apr.evaluation.tasks.ledger import (
    LARGEST_PRICE,
    PEOPLE,
    LedgerKind,
    LedgerProblem,
    LedgerTask,
    Payment,
    generate_ledgers,
)
from sgl_apr.methods.context_parts import ANSWER, NOTES, READ_PART
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.spans import Origin, Role, Span
from sgl_apr.trajectory.trajectory import Trajectory

KINDS: tuple[LedgerKind, ...] = ("needle", "count", "sum")
PART_LINES = 20  # of 320 tokens of SmolLM2
LEDGER_LINES = 4096  # of the longest ledger
PROMPT_LINES = 64  # of a ledger in one prompt
MAX_NOTES = 16  # in one part
MORE_QUESTIONS = 12


@dataclass(frozen=True, slots=True)
class LedgerReading:
    """One prompt with its reply.

    Attributes:
        message: What the user says.
        reply: What the model learns to say.
        kind: The kind of the question.
        more: Further questions about the same payments, and their replies. A reply has few tokens, so that a model learns to
            look something up from many of them for each text that it reads.
    """

    message: str
    reply: str
    kind: LedgerKind
    more: tuple[tuple[str, str], ...] = ()

    @property
    def prompt(self) -> str:
        """The prompt as the chat template makes it."""
        return CHATML.turn(self.message)


def ledger_readings(count: int, seed: int = 0) -> Iterator[LedgerReading]:
    """Demonstrations: parts of payments, parts of notes, answers from both, and short ledgers in one prompt, in turn.

    Args:
        count: How many.
        seed: Their seed.
    """
    notes = (_read_notes, _answer_notes) * 2  # their texts have one question each
    makers = (_read_payments, _read_payments, *notes, _answer_payments, _answer_ledger)
    for number in range(count):
        rng = random.Random(f"{seed} ledger readings {number}")
        yield makers[number % len(makers)](rng, KINDS[number // len(makers) % len(KINDS)])


def reading_trajectory(reading: LedgerReading, tokenizer: Tokenizer) -> Trajectory:
    """A demonstration as a trajectory to train on: a prompt, and replies with a loss. Further questions are injected."""

    def span(role: Role, origin: Origin, text: str, **options: Any) -> Span:
        ids = tuple(tokenizer.encode(text))
        return Span(role, origin, text, ids, (len(spans) - 1,) if spans else (), **options)

    spans = list[Span]()
    spans.append(span("prompt", "prompt", reading.prompt))
    reply = reading.reply
    for question, following in reading.more:
        end, turn = CHATML.reply_suffix[:-1], "\n" + CHATML.turn(question)
        spans.append(span("text", "decoded", f"{reply}{end}"))
        spans.append(span("text", "injected", turn))
        reply = following
    spans.append(span("text", "decoded", reply, finish="eos"))
    return Trajectory(tuple(spans), "sequential")


def note_of_payments(problem: LedgerProblem) -> str:
    """The note of a part: quotes, and its value; empty if it says nothing.

    Args:
        problem: The payments of the part, and the question.

    Examples:
        >>> paid = (Payment(3, "Ada", "Dan", 12, "hats"), Payment(17, "Ada", "Ben", 44, "eggs"))
        >>> note_of_payments(LedgerProblem(paid, "sum", "Ada"))
        '[3] Ada paid Dan 12 = 12, [17] Ada paid Ben 44 = 56'
    """
    own = [p for p in problem.payments if p.payer == problem.person]
    match problem.kind:
        case "needle":
            return next((_quote(p) for p in problem.payments if p.number == problem.number), "")
        case "count":
            return _note([f"[{p.number}] {p.payer}" for p in own], [1] * len(own))
        case _:
            return _note([_quote(p) for p in own], [p.coins for p in own])


def note_of_notes(kind: LedgerKind, notes: Mapping[int, str]) -> str:
    """The note of a part that consists of notes: their values, and running totals; a needle is quoted again.

    Args:
        kind: The kind of the question.
        notes: The notes by their numbers, none of them empty.

    Examples:
        >>> note_of_notes("count", {4: "[3] Ada = 1, [17] Ada = 2", 9: "[31] Ada = 1"})
        '4: 2 = 2, 9: 1 = 3'
    """
    if kind == "needle":
        return next(iter(notes.values()))
    values = [int(note.split()[-1]) for note in notes.values()]
    return _note([f"{number}: {value}" for number, value in zip(notes, values, strict=True)], values)


def _quote(payment: Payment) -> str:
    return f"[{payment.number}] {payment.payer} paid {payment.payee} {payment.coins}"


def _note(quotes: Sequence[str], values: Sequence[int]) -> str:
    return ", ".join(f"{quote} = {total}" for quote, total in zip(quotes, accumulate(values), strict=True))


def _more(
    rng: random.Random, problem: LedgerProblem, reply: Callable[[LedgerProblem], str]
) -> tuple[tuple[str, str], ...]:
    """Further questions about the same payments."""
    made = list[tuple[str, str]]()
    for _ in range(MORE_QUESTIONS):
        payment = rng.choice(problem.payments)
        number = payment.number if rng.random() < 0.8 else rng.randint(1, LEDGER_LINES)
        person = payment.payer if rng.random() < 0.8 else rng.choice(PEOPLE)
        other = LedgerProblem(problem.payments, rng.choice(KINDS), person, number)
        made.append((other.question, reply(other)))
    return tuple(made)


def _answer(note: str) -> str:
    return f"{note}\nAnswer: {note.rpartition(' ')[2] or 0}"


def _problem(rng: random.Random, lines: int, kind: LedgerKind, first: int | None = None) -> LedgerProblem:
    """A part of a ledger, whose lines begin anywhere, with a question that it need not answer."""
    (generated,) = generate_ledgers(1, lines, seed=rng.getrandbits(48), kinds=(kind,))
    start = rng.randrange(LEDGER_LINES) if first is None else first
    payments = tuple(
        Payment(p.number + start, p.payer, p.payee, p.coins, p.goods) for p in generated.payments
    )
    inside = first is not None or rng.random() < 0.7
    number = rng.randint(start + 1, start + lines) if inside else rng.randint(1, LEDGER_LINES)
    return LedgerProblem(payments, kind, generated.person, number)


def _lines_of(rng: random.Random, largest: int) -> int:
    """A number of lines, evenly over its logarithm: short texts give more replies for as many tokens."""
    return round(math.exp(rng.uniform(0, math.log(largest + 0.5))))


def _lines(problem: LedgerProblem) -> str:
    return "".join(f"{p.text}\n" for p in problem.payments)


def _read(rng: random.Random, part: str, question: str) -> str:
    count = rng.randint(2, LEDGER_LINES // PART_LINES)
    return READ_PART.format(number=rng.randint(1, count), count=count, part=part, question=question)


def _read_payments(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    problem = _problem(rng, _lines_of(rng, PART_LINES), kind)
    part = _lines(problem) if rng.random() < 0.9 else _lines(problem).rstrip("\n")  # of a last part
    note, more = note_of_payments(problem), _more(rng, problem, note_of_payments)
    return LedgerReading(_read(rng, part, problem.question), note, kind, more)


def _notes(rng: random.Random, kind: LedgerKind) -> tuple[str, dict[int, str]]:
    """Lines of notes, and the notes by their numbers."""
    notes = {
        n: _some_note(rng, kind) for n in _numbers(rng, 1 if kind == "needle" else _lines_of(rng, MAX_NOTES))
    }
    return "".join(f"{number}: {note}\n" for number, note in notes.items()), notes


def _numbers(rng: random.Random, count: int) -> list[int]:
    """Numbers of parts that have a note."""
    return sorted(rng.sample(range(1, 4 * MAX_NOTES), count))


def _some_note(rng: random.Random, kind: LedgerKind) -> str:
    if kind != "needle" and rng.random() < 0.4:  # a note of notes
        notes = {
            n: f"{rng.randint(1, 199 if kind == 'sum' else 4)}" for n in _numbers(rng, rng.randint(1, 8))
        }
        return note_of_notes(kind, notes)
    person, *others = rng.sample(PEOPLE, 4)
    numbers = sorted(rng.sample(range(1, LEDGER_LINES), rng.choice((1, 1, 1, 2, 2, 3))))
    payments = tuple(
        Payment(n, person, payee, rng.randint(1, LARGEST_PRICE), "")
        for n, payee in zip(numbers, others, strict=False)
    )
    return note_of_payments(LedgerProblem(payments, kind, person, numbers[0]))


def _question(rng: random.Random, kind: LedgerKind) -> str:
    return _problem(rng, 4, kind).question


def _read_notes(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    lines, notes = _notes(rng, kind)
    if rng.random() < 0.3:  # the last part ends without a line break
        lines = lines.rstrip("\n")
    text = NOTES.format(notes=lines) if rng.random() < 0.3 else lines
    return LedgerReading(_read(rng, text, _question(rng, kind)), note_of_notes(kind, notes), kind)


def _answer_notes(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    lines, notes = _notes(rng, kind)
    text = NOTES.format(notes=lines.rstrip("\n"))
    message = ANSWER.format(text=text, question=_question(rng, kind))
    return LedgerReading(message, _answer(note_of_notes(kind, notes)), kind)


def _answer_payments(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    problem = _problem(rng, _lines_of(rng, PART_LINES), kind, first=0)
    message = ANSWER.format(text=_lines(problem).rstrip("\n"), question=problem.question)
    return _answer_reading(rng, message, problem)


def _answer_ledger(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    problem = _problem(rng, _lines_of(rng, PROMPT_LINES), kind, first=0)
    message = f"{problem.text}\n{LedgerTask.answer_instruction}"
    return _answer_reading(rng, message, problem)


def _answer_reading(rng: random.Random, message: str, problem: LedgerProblem) -> LedgerReading:
    def reply(one: LedgerProblem) -> str:
        return _answer(note_of_payments(one))

    return LedgerReading(message, reply(problem), problem.kind, _more(rng, problem, reply))
