"""Long texts of payments, and questions whose answer needs all of a text, or one line of it; each has one verifiable answer.

The kinds of questions are those of OOLONG (aggregation over a long context) and of needle tests. All data are generated here.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from sgl_apr.errors import AprError
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.runtime.value_checks import shorten

LedgerKind = Literal["needle", "count", "sum", "largest"]
PEOPLE = (
    "Ada", "Ben", "Cora", "Dan", "Ella", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kira", "Liam", "Mona", "Nils", "Olga", "Paul",
)  # fmt: skip
GOODS = ("apples", "books", "chairs", "drums", "eggs", "flutes", "gloves", "hats")
LARGEST_PRICE = 99
TOKENS_PER_LINE = 16  # of SmolLM2


@dataclass(frozen=True, slots=True)
class Payment:
    """One line of a ledger."""

    number: int
    payer: str
    payee: str
    coins: int
    goods: str

    @property
    def text(self) -> str:
        """The line.

        Examples:
            >>> Payment(7, "Ada", "Ben", 12, "hats").text
            '[7] Ada paid Ben 12 coins for hats.'
        """
        return f"[{self.number}] {self.payer} paid {self.payee} {self.coins} coins for {self.goods}."


@dataclass(frozen=True, slots=True)
class LedgerProblem:
    """A ledger with a question about it.

    Attributes:
        payments: The lines.
        kind: What is asked.
        person: About whom.
        number: About which line, for a needle.
    """

    payments: tuple[Payment, ...]
    kind: LedgerKind
    person: str
    number: int = 0

    @property
    def text(self) -> str:
        """All lines, and the question as the last paragraph."""
        return "\n".join(payment.text for payment in self.payments) + f"\n\n{self.question}"

    @property
    def question(self) -> str:
        """The question."""
        match self.kind:
            case "needle":
                return f"How many coins were paid in line {self.number}? Answer with a number."
            case "count":
                return f"How many times did {self.person} pay somebody? Answer with a number."
            case "sum":
                return f"How many coins did {self.person} pay in all? Answer with a number."
            case "largest":
                return "Who paid the largest number of coins in all? Answer with a name."

    @property
    def answer(self) -> str:
        """The one right answer."""
        own = [payment.coins for payment in self.payments if payment.payer == self.person]
        match self.kind:
            case "needle":
                return str(next(p.coins for p in self.payments if p.number == self.number))
            case "count":
                return str(len(own))
            case "sum":
                return str(sum(own))
            case "largest":
                return max(self.totals, key=self.totals.__getitem__)

    @property
    def totals(self) -> Counter[str]:
        """What each person has paid in all."""
        totals = Counter[str]()
        for payment in self.payments:
            totals[payment.payer] += payment.coins
        return totals


def generate_ledgers(
    count: int, lines: int, seed: int = 0, kinds: tuple[LedgerKind, ...] = get_args(LedgerKind)
) -> Iterator[LedgerProblem]:
    """Ledgers of that many lines, the same for the same seed. Their kinds take turns, and nobody ties for the largest sum.

    Args:
        count: How many.
        lines: Lines of each; 16 tokens or so.
        seed: Their seed.
        kinds: What is asked.

    Raises:
        AprError: A number is below 1.
    """
    if count < 1 or lines < 1:
        raise AprError(f"count={count}, lines={lines}, expected at least 1")
    for number in range(count):
        rng = random.Random(f"{seed} {lines} {number}")
        kind = kinds[number % len(kinds)]
        while True:
            payments = tuple(_payment(rng, line) for line in range(1, lines + 1))
            person = rng.choice([payment.payer for payment in payments])
            problem = LedgerProblem(payments, kind, person, rng.randint(1, lines))
            (first, *others) = sorted(problem.totals.values(), reverse=True)
            if kind != "largest" or not others or first > others[0]:
                break
        yield problem


def _payment(rng: random.Random, number: int) -> Payment:
    payer, payee = rng.sample(PEOPLE, 2)
    return Payment(number, payer, payee, rng.randint(1, LARGEST_PRICE), rng.choice(GOODS))


class LedgerTask(QuestionTask):
    """Questions about a ledger, which is the text of a problem before its last paragraph."""

    name = "ledger"
    max_tokens = 512
    comparable = True
    answer_instruction = 'Say the answer in a last line that begins with "Answer:".'

    def answer(self, text: str) -> str:
        """The last number or name of the answer.

        Examples:
            >>> LedgerTask.answer(None, "I add them.\\nAnswer: 1,204 coins.")
            '1204'
        """
        words = re.findall(r"\d+|[A-Z][a-z]+", QuestionTask.answer(self, text).replace(",", ""))
        known = [word for word in words if word.isdigit() or word in PEOPLE]
        return known[-1] if known else ""


def lines_of(size: str) -> int:
    """How many lines a ledger of so many tokens has.

    Args:
        size: Thousands of tokens, such as "4k".

    Raises:
        AprError: It is no such size.
    """
    if not re.fullmatch(r"\d{1,4}k", size) or size.startswith("0"):
        raise AprError(f"no size {shorten(size)} of a ledger, expected thousands of tokens such as 4k")
    return int(size[:-1]) * 1000 // TOKENS_PER_LINE
