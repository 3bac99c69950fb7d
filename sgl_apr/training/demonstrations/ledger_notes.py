"""Demonstrations of reading a long ledger in parts, as `recursive(part_tokens=...)` puts them to a model: notes and answers.

A note of payments lists what was found, and ends with the value of the part: "3 17 : 2" for a count (the lines, and how many),
"12 44 : 12 56" for a sum (the coins, and running totals), "29" for a needle. A note of notes, and an answer, add the values up: "2 3 6".
A part that says nothing has an empty note.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sgl_apr.evaluation.tasks.chat_template import CHATML
from sgl_apr.evaluation.tasks.ledger import PEOPLE, LedgerKind, LedgerProblem, LedgerTask, generate_ledgers
from sgl_apr.methods.context_parts import ANSWER, NOTES, READ_PART
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.spans import Origin, Role, Span
from sgl_apr.trajectory.trajectory import Trajectory

KINDS: tuple[LedgerKind, ...] = ("needle", "count", "sum")
PART_LINES = 21  # of 256 tokens of the small model
LEDGER_LINES = 4096  # of the longest ledger
PROMPT_LINES = 60  # of a ledger in one prompt
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
    makers = (_read_payments, _read_payments, _read_notes, _answer_notes, _answer_payments, _answer_ledger)
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
    """The note of a part: what it lists, and its value; empty if it says nothing.

    Args:
        problem: The payments of the part, and the question.
    """
    own = [p for p in problem.payments if p.payer == problem.person]
    match problem.kind:
        case "needle":
            return next((str(p.coins) for p in problem.payments if p.number == problem.number), "")
        case "count":
            return _note([p.number for p in own], [len(own)])
        case _:
            coins = [p.coins for p in own]
            return _note(coins, list(accumulate(coins)))


def note_of_notes(kind: LedgerKind, values: Sequence[int]) -> str:
    """The note of a part that consists of notes: running totals of their values, and the last one as its value."""
    return str(values[0]) if kind == "needle" else " ".join(map(str, accumulate(values)))


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


def _note(listed: Sequence[int], totals: Sequence[int]) -> str:
    return f"{' '.join(map(str, listed))} : {' '.join(map(str, totals))}" if listed else ""


def _answer(note: str) -> str:
    return f"{note}\nAnswer: {note.rpartition(' ')[2] or 0}"


def _problem(rng: random.Random, lines: int, kind: LedgerKind, first: int | None = None) -> LedgerProblem:
    """A part of a ledger, whose lines begin anywhere, with a question that it need not answer."""
    (generated,) = generate_ledgers(1, lines, seed=rng.getrandbits(48), kinds=(kind,))
    start = rng.randrange(LEDGER_LINES) if first is None else first
    payments = tuple(
        type(p)(p.number + start, p.payer, p.payee, p.coins, p.goods) for p in generated.payments
    )
    inside = first is not None or rng.random() < 0.7
    number = rng.randint(start + 1, start + lines) if inside else rng.randint(1, LEDGER_LINES)
    return LedgerProblem(payments, kind, generated.person, number)


def _lines(problem: LedgerProblem) -> str:
    return "".join(f"{p.text}\n" for p in problem.payments)


def _read(rng: random.Random, part: str, question: str) -> str:
    count = rng.randint(2, LEDGER_LINES // PART_LINES)
    return READ_PART.format(number=rng.randint(1, count), count=count, part=part, question=question)


def _read_payments(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    problem = _problem(rng, rng.randint(2, PART_LINES), kind)
    part = _lines(problem) if rng.random() < 0.9 else _lines(problem).rstrip("\n")  # of a last part
    note, more = note_of_payments(problem), _more(rng, problem, note_of_payments)
    return LedgerReading(_read(rng, part, problem.question), note, kind, more)


def _notes(rng: random.Random, kind: LedgerKind) -> tuple[str, list[int]]:
    """Lines of notes, and their values."""
    count = 1 if kind == "needle" else rng.randint(1, MAX_NOTES)
    numbers = sorted(rng.sample(range(1, 4 * MAX_NOTES), count))
    lines, values = list[str](), list[int]()
    for number in numbers:
        if kind == "needle":
            found = [rng.randint(1, 99)]
            note = str(found[0])
        elif rng.random() < 0.4:  # a note of notes
            found = [rng.randint(1, 199 if kind == "sum" else 4) for _ in range(rng.randint(1, 8))]
            note = note_of_notes(kind, found)
        elif kind == "count":
            found = sorted(rng.sample(range(1, LEDGER_LINES), rng.choice((1, 1, 1, 2, 2, 3))))
            note = _note(found, [len(found)])
            found = [len(found)]
        else:
            found = [rng.randint(1, 99) for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))]
            note = _note(found, list(accumulate(found)))
        lines.append(f"{number}: {note}\n")
        values.append(sum(found))
    return "".join(lines), values


def _question(rng: random.Random, kind: LedgerKind) -> str:
    return _problem(rng, 4, kind).question


def _read_notes(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    lines, values = _notes(rng, kind)
    if rng.random() < 0.3:  # the last part ends without a line break
        lines = lines.rstrip("\n")
    text = NOTES.format(notes=lines) if rng.random() < 0.3 else lines
    return LedgerReading(_read(rng, text, _question(rng, kind)), note_of_notes(kind, values), kind)


def _answer_notes(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    lines, values = _notes(rng, kind)
    text = NOTES.format(notes=lines.rstrip("\n"))
    message = ANSWER.format(text=text, question=_question(rng, kind))
    return LedgerReading(message, _answer(note_of_notes(kind, values)), kind)


def _answer_payments(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    problem = _problem(rng, rng.randint(2, PART_LINES), kind, first=0)
    message = ANSWER.format(text=_lines(problem).rstrip("\n"), question=problem.question)
    return _answer_reading(rng, message, problem)


def _answer_ledger(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    problem = _problem(rng, rng.randint(2, PROMPT_LINES), kind, first=0)
    message = f"{problem.text}\n{LedgerTask.answer_instruction}"
    return _answer_reading(rng, message, problem)


def _answer_reading(rng: random.Random, message: str, problem: LedgerProblem) -> LedgerReading:
    def reply(one: LedgerProblem) -> str:
        return _answer(note_of_payments(one))

    return LedgerReading(message, reply(problem), problem.kind, _more(rng, problem, reply))
