"""Demonstrations of reading a long ledger in parts, as `recursive(part_tokens=...)` puts them to a model: notes and answers.

A note of payments says where they end and walks through them, so that each next word is a copy of the next line, and keeps the total
so far: "to [18]: [16] Ben [17] Ada = 1 [18] Mona: 1" for a count. A model that did not say where they end stopped a line or two before
or after it. A sum adds a digit at a time, "[17] Ada 44 = 40 = 44", since a model that added numbers in one step missed carries. The note
of a needle says where the payments begin and end, and what their line says, "[1] to [20]: [8] Gina paid Olga 29", or "none": a model
that did not say where they end quoted another line. A note of notes, and an answer, say which note is the last one and add their values
up, each after the number of its note: "to 2: 1: 2 = 2, 2: 1 = 3". That of a needle repeats what a note quotes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
SUMMED: tuple[LedgerKind, ...] = ("count", "sum")
PART_LINES = 20  # of 320 tokens of SmolLM2
LEDGER_LINES = 4096  # of the longest ledger
PROMPT_LINES = 64  # of a ledger in one prompt
MAX_NOTES = 16  # in one part, of notes of notes and of needles
NO_LINE = "none"  # what the note of a needle says whose line is not there
MAX_SUMS = 8  # in one part, of notes of notes that add numbers of several digits
MAX_WALKS = 3  # in one part, of notes of payments
MORE_LINES = 60  # that further counts and sums about one text walk through
MORE_NEEDLES = 8  # further questions about one line, half of them about one that is not there


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
    notes = (_read_notes, _answer_notes) * 5  # their texts are short, and have one question each
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
    """The note of a part.

    Args:
        problem: The payments of the part, and the question.

    Examples:
        >>> paid = (Payment(3, "Ada", "Dan", 12, "hats"), Payment(4, "Ben", "Ada", 7, "eggs"), Payment(5, "Ada", "Ben", 44, "eggs"))
        >>> note_of_payments(LedgerProblem(paid, "sum", "Ada"))
        'to [5]: [3] Ada 12 = 10 = 12 [4] Ben [5] Ada 44 = 52 = 56: 56'
        >>> note_of_payments(LedgerProblem(paid, "needle", "Ada", 4))
        '[3] to [5]: [4] Ben paid Ada 7'
    """
    if problem.kind == "needle":
        line = next((_quote(p) for p in problem.payments if p.number == problem.number), NO_LINE)
        return f"[{problem.payments[0].number}] to [{problem.payments[-1].number}]: {line}"
    total, words = 0, [f"to [{problem.payments[-1].number}]:"]
    for payment in problem.payments:
        words.append(f"[{payment.number}] {payment.payer}")
        if payment.payer != problem.person:
            continue
        if problem.kind == "sum":
            words.append(f"{payment.coins}")
        value = payment.coins if problem.kind == "sum" else 1
        words.append(_addition(total, value))
        total += value
    return " ".join(words) + f": {total}"


def note_of_notes(problem: LedgerProblem, notes: Mapping[int, str]) -> str:
    """The note of a part that consists of notes: their values, and running totals. That of a needle is what a note quotes.

    Args:
        problem: The question.
        notes: The notes by their numbers.

    Examples:
        >>> notes = {4: "to [5]: [3] Ada = 1 [4] Ben [5] Ada = 2: 2", 5: "to [7]: [6] Ben [7] Ada = 1: 1"}
        >>> note_of_notes(LedgerProblem((), "count", "Ada"), notes)
        'to 5: 4: 2 = 2, 5: 1 = 3'
        >>> note_of_notes(LedgerProblem((), "needle", "Ada", 4), {1: "[1] to [3]: none", 2: "[4] to [5]: [4] Ben paid Ada 7"})
        '[4] Ben paid Ada 7'
    """
    if problem.kind == "needle":
        start = f"[{problem.number}] "
        quotes = (note.rpartition(": ")[2] for note in notes.values())
        return next((quote for quote in quotes if quote.startswith(start) and " paid " in quote), NO_LINE)
    return _add_up(list(notes), [int(note.split()[-1]) for note in notes.values()])


def _add_up(numbers: Sequence[int], values: Sequence[int]) -> str:
    totals = accumulate(values, initial=0)
    sums = zip(numbers, values, totals, strict=False)
    steps = (f"{number}: {value} {_addition(total, value)}" for number, value, total in sums)
    return f"to {numbers[-1]}: " + ", ".join(steps)


def _addition(total: int, value: int) -> str:
    """The totals after each digit of a value that is not 0, its largest first: "= 159 = 160" for 79 + 81."""
    digits = [int(digit) * 10 ** (len(str(value)) - k) for k, digit in enumerate(str(value), 1)]
    totals = [*accumulate((digit for digit in digits if digit), initial=total)]
    return " ".join(f"= {one}" for one in totals[1:] or totals)


def _quote(payment: Payment) -> str:
    return f"[{payment.number}] {payment.payer} paid {payment.payee} {payment.coins}"


def _more(
    rng: random.Random, problem: LedgerProblem, reply: Callable[[LedgerProblem], str]
) -> tuple[tuple[str, str], ...]:
    """Further questions about the same payments."""
    made, walks = list[tuple[str, str]](), min(MORE_NEEDLES, MORE_LINES // len(problem.payments))
    kinds: list[LedgerKind] = [rng.choice(SUMMED) for _ in range(walks)] + ["needle"] * MORE_NEEDLES
    for kind in rng.sample(kinds, len(kinds)):
        payment = rng.choice(problem.payments)
        number = payment.number if rng.random() < 0.5 else _number(rng, problem.payments)
        person = payment.payer if rng.random() < 0.8 else rng.choice(PEOPLE)
        other = LedgerProblem(problem.payments, kind, person, number)
        made.append((other.question, reply(other)))
    return tuple(made)


def _answer(note: str) -> str:
    value = note.rpartition(" ")[2]
    return f"{note}\nAnswer: {0 if value == NO_LINE else value}"


def _problem(rng: random.Random, lines: int, kind: LedgerKind, first: int | None = None) -> LedgerProblem:
    """A part of a ledger, whose lines begin anywhere, with a question that it need not answer."""
    (generated,) = generate_ledgers(1, lines, seed=rng.getrandbits(48), kinds=(kind,))
    # Numbers of two digits are as frequent as those of four: in lines 21 to 99 a model without that lost its place.
    start = _log_uniform(rng, LEDGER_LINES) - 1 if first is None else first
    payments = tuple(
        Payment(p.number + start, p.payer, p.payee, p.coins, p.goods) for p in generated.payments
    )
    inside = first is not None or rng.random() < 0.5
    number = rng.randint(start + 1, start + lines) if inside else _number(rng, payments)
    return LedgerProblem(payments, kind, generated.person, number)


def _number(rng: random.Random, payments: Sequence[Payment]) -> int:
    """A line to ask about that these payments need not have: near them, or one that has as many digits as often as they do."""
    if rng.random() < 0.5:
        return max(1, rng.randint(payments[0].number - PART_LINES, payments[-1].number + PART_LINES))
    return _log_uniform(rng, LEDGER_LINES)


def _log_uniform(rng: random.Random, largest: int) -> int:
    """A number from 1 to the largest, evenly over its logarithm: short texts give more replies for as many tokens."""
    return round(math.exp(rng.uniform(0, math.log(largest + 0.5))))


def _lines(problem: LedgerProblem) -> str:
    return "".join(f"{p.text}\n" for p in problem.payments)


def _read(rng: random.Random, part: str, question: str) -> str:
    count = rng.randint(2, LEDGER_LINES // PART_LINES)
    return READ_PART.format(number=rng.randint(1, count), count=count, part=part, question=question)


def _read_payments(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    # A long text has full parts, but for its last one.
    lines = rng.randint(PART_LINES - 4, PART_LINES) if rng.random() < 0.5 else _log_uniform(rng, PART_LINES)
    problem = _problem(rng, lines, kind)
    part = _lines(problem) if rng.random() < 0.9 else _lines(problem).rstrip("\n")  # of a last part
    note, more = note_of_payments(problem), _more(rng, problem, note_of_payments)
    return LedgerReading(_read(rng, part, problem.question), note, kind, more)


def _notes(rng: random.Random, kind: LedgerKind) -> tuple[LedgerProblem, str, dict[int, str]]:
    """A question, lines of notes about it, and the notes by their numbers."""
    (problem,) = generate_ledgers(1, 2, seed=rng.getrandbits(48), kinds=(kind,))
    problem = replace(problem, number=_log_uniform(rng, LEDGER_LINES))
    if kind == "needle":
        written = _needles(rng, problem.number)
    elif rng.random() < 0.5:
        written = [_walk(rng, problem) for _ in range(rng.randint(1, MAX_WALKS))]
    else:
        written = [
            _sums(rng, kind) for _ in range(_log_uniform(rng, MAX_NOTES if kind == "count" else MAX_SUMS))
        ]
    first = 1 if rng.random() < 0.4 else _log_uniform(rng, LEDGER_LINES // PART_LINES)
    notes = dict(enumerate(written, first))
    return problem, "".join(f"{number}: {note}\n" for number, note in notes.items()), notes


def _needles(rng: random.Random, number: int) -> list[str]:
    """Notes about a line of parts that follow one another, or notes of such notes, which do not say where parts begin and end."""
    lines = [rng.randint(PART_LINES - 2, PART_LINES) for _ in range(_log_uniform(rng, MAX_NOTES))]
    inside = rng.random() < 0.75
    first = max(1, number - rng.randrange(sum(lines))) if inside else number + rng.randint(1, LEDGER_LINES)
    show_lines, notes = rng.random() < 0.6, list[str]()
    for count in lines:
        quote = _needle(rng, number) if first <= number < first + count else NO_LINE
        notes.append(f"[{first}] to [{first + count - 1}]: {quote}" if show_lines else quote)
        first += count
    return notes


def _needle(rng: random.Random, number: int) -> str:
    payer, payee = rng.sample(PEOPLE, 2)
    return _quote(Payment(number, payer, payee, rng.randint(1, LARGEST_PRICE), ""))


def _walk(rng: random.Random, problem: LedgerProblem) -> str:
    """A note of payments about a question."""
    part = _problem(rng, _log_uniform(rng, PART_LINES), problem.kind)
    return note_of_payments(replace(part, person=problem.person))


def _sums(rng: random.Random, kind: LedgerKind) -> str:
    """A note of notes."""
    first = _log_uniform(rng, LEDGER_LINES // PART_LINES)
    numbers = range(first, first + rng.choice((1, 2, 2, 2, 3, 4)))
    return _add_up(
        numbers, [_log_uniform(rng, 2000) - 1 if kind == "sum" else rng.randint(0, 4) for _ in numbers]
    )


def _read_notes(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    problem, lines, notes = _notes(rng, kind)
    if rng.random() < 0.3:  # the last part ends without a line break
        lines = lines.rstrip("\n")
    text = NOTES.format(notes=lines) if rng.random() < 0.3 else lines
    return LedgerReading(_read(rng, text, problem.question), note_of_notes(problem, notes), kind)


def _answer_notes(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    problem, lines, notes = _notes(rng, kind)
    text = NOTES.format(notes=lines.rstrip("\n"))
    return LedgerReading(
        ANSWER.format(text=text, question=problem.question), _answer(note_of_notes(problem, notes)), kind
    )


def _answer_payments(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    problem = _problem(rng, _log_uniform(rng, PART_LINES), kind, first=0)
    message = ANSWER.format(text=_lines(problem).rstrip("\n"), question=problem.question)
    return _answer_reading(rng, message, problem)


def _answer_ledger(rng: random.Random, kind: LedgerKind) -> LedgerReading:
    problem = _problem(rng, _log_uniform(rng, PROMPT_LINES), kind, first=0)
    message = f"{problem.text}\n{LedgerTask.answer_instruction}"
    return _answer_reading(rng, message, problem)


def _answer_reading(rng: random.Random, message: str, problem: LedgerProblem) -> LedgerReading:
    def reply(one: LedgerProblem) -> str:
        return _answer(note_of_payments(one))

    return LedgerReading(message, reply(problem), problem.kind, _more(rng, problem, reply))
