"""Generates valid and broken documents of any dialect from its grammar."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from hypothesis import strategies as st

import sgl_apr as apr
from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar, merge_tag_parts
from sgl_apr.formats.lark_ast import Alt, Expr, Repeat, SequenceExpr, StringLiteral, SymbolRef
from sgl_apr.formats.masks.document import has_per_branch_items, starts_block

PIECES = (
    "<",
    ">",
    "</",
    "<b>",
    "</i>",
    "x < y",
    "a",
    "Zeile\n",
    "1:",
    "...",
    " ",
    "\n",
    "\t",
    '"/>',
    "<|",
    "\\",
)
PIECES += ("ü", "日本", "\U0001f600", "e\u0301", "\u2028", "0,1", "#", "-->", "<1>", "< a")
NAMES = ("0", "0,1", "12,3,4", "a topic", "größe & co")


def documents(dialect: apr.Dialect, width: int = 3, depth: int = 2) -> st.SearchStrategy[str]:
    """A strategy for valid replies."""
    return st.randoms(use_true_random=False).map(lambda rng: document(dialect, rng, width, depth))


def document(dialect: apr.Dialect, rng: random.Random, width: int = 3, depth: int = 2) -> str:
    """A valid reply with blocks of at most `width` branches, nested at most `depth` deep if the dialect nests."""
    author = _Author(dialect.grammar, rng, min(width, dialect.max_width), dialect.first_number)
    return author.write(SymbolRef("trace"), _At(min(depth, dialect.max_depth)))


def tags(dialect: apr.Dialect, text: str, *, named: bool = False) -> list[re.Match[str]]:
    """The tags in a text, with their numbers.

    `<promise topic="` is such a tag. With `named` it includes the topic, up to `>`.
    """
    found = {t.text for seq in dialect.grammar._sequences() for t in merge_tag_parts(seq, "\0") if _is_tag(t)}
    patterns = (re.escape(t).replace("\0", r"[0-9.]+") for t in sorted(found, key=len, reverse=True))
    return list(
        re.finditer("|".join(p if not named or p.endswith(">") else p + "[^<>]*>" for p in patterns), text)
    )


def without_a_tag(dialect: apr.Dialect, text: str) -> Iterator[str]:
    """The text without one of its tags, for each tag."""
    for named in (False, True):
        for tag in tags(dialect, text, named=named):
            yield text[: tag.start()] + text[tag.end() :]


def with_tags_swapped(dialect: apr.Dialect, text: str, *, named: bool = False) -> Iterator[str]:
    """The text with two adjacent and different tags swapped, for each pair."""
    for a, b in pairwise(tags(dialect, text, named=named)):
        if a[0] != b[0]:
            swapped = text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]
            if swapped != text:
                yield swapped


def free_text(grammar: Grammar, rng: random.Random) -> str:
    """Text without tags, without anything that resembles one, and not only of beginnings of tags."""
    marks = [mark.strip("</>") for mark in grammar.tag_literals]
    names = "|".join(map(re.escape, marks))
    begun = "|".join(
        sorted({re.escape(m[:k]) for m in marks for k in range(1, len(m) + 1)}, key=len, reverse=True)
    )
    while True:
        pieces = [rng.choice(PIECES) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.3:
            mark = rng.choice(grammar.tag_literals)
            pieces.append(mark[: rng.randint(1, len(mark) - 1)])
        if rng.random() < 0.3:
            pieces.append(chr(rng.randint(0x20, 0xD7FF)))
        rng.shuffle(pieces)
        text = "".join(pieces)
        content = re.sub(rf"</?(?:{begun}|)", "", text, flags=re.IGNORECASE)
        if content and not re.search(rf"</?(?:{names})", text, re.IGNORECASE):
            return text


@dataclass(frozen=True)
class _At:
    """A position in the structure of a document.

    `depth` levels of blocks are left, `branches` is the number of branches of the block, `names` are the names of its
    branches, and `move` is "fork" or "wait" where one of them has to follow.
    """

    depth: int
    number: str = ""
    prefix: str = ""
    branches: int = 0
    names: dict[str, str] = field(default_factory=dict)
    move: str = ""


@dataclass(frozen=True)
class _Author:
    grammar: Grammar
    rng: random.Random
    width: int
    first: int

    def write_block(self, expr: Expr, at: _At) -> str:
        """Write an expression that can hold the branches of a new block."""
        if not has_per_branch_items(self.grammar, expr):
            return self.write(expr, at)
        low = self._min_branches(expr)
        return self.write(expr, replace(at, branches=self.rng.randint(low, max(low, self.width)), names={}))

    def write(self, expr: Expr, at: _At) -> str:
        rules, rng = self.grammar.rules, self.rng
        match expr:
            case StringLiteral(text):
                return text
            case SymbolRef(name) if name == NUMBER:
                return at.number
            case SymbolRef(name) if name == TEXT:
                return free_text(self.grammar, rng)
            case SymbolRef(name) if name in rules:
                return (self.write_block if name == "trace" else self.write)(rules[name], at)
            case SymbolRef(name):
                terminal = self.grammar.terminals[name]
                if isinstance(terminal, StringLiteral):
                    return terminal.text
                fitting = [n for n in NAMES if re.fullmatch(terminal, n)]
                return at.names.setdefault(at.number, rng.choice(fitting))
            case SequenceExpr(items):
                return self.write_sequence(items, at)
            case Alt(options):
                required = [o for o in options if at.move and starts_block(self.grammar, o, (at.move,))]
                return self.write(rng.choice(required or [o for o in options if self._fits(o, at)]), at)
            case Repeat(item, low, unbounded=False):
                return self.write(item, at) if low or rng.random() < 0.6 else ""
            case Repeat(item, low) if starts_block(self.grammar, item):
                return self.blocks(item, low, at)
            case Repeat():
                return self.write_sequence((expr,), at)

    def write_sequence(self, items: tuple[Expr, ...], at: _At) -> str:
        """Write items in sequence, and per-branch items once for each branch."""
        per_branch = self._per_branch_items(items)
        once = sum(i in per_branch for i in items)
        written, k = "", 0
        for item in items:
            branch = item.item if isinstance(item, Repeat) else item
            if branch not in per_branch:
                written += self.write(item, at)
                continue
            for _ in range(at.branches - once if isinstance(item, Repeat) else 1):
                number = f"{at.prefix}{self.first + k}"
                inside = replace(at, number=number, prefix=f"{number}.")
                written, k = written + self.write(branch, inside), k + 1
        return written

    def blocks(self, item: Expr, low: int, at: _At) -> str:
        """Write any number of blocks, and wait for every branch that was forked off."""
        at = replace(at, depth=at.depth - 1, names={})
        times = self.rng.randint(low, max(low, 2)) if at.depth >= 0 else 0
        if "wait" not in self.grammar.rules:
            return "".join(self.write_block(item, at) for _ in range(times))
        written, forked, waiting = "", 0, list[str]()
        for left in reversed(range(3 * times)):
            if not left and waiting:
                break
            moves = ["fork"] * (forked < self.width) + ["wait"] * bool(waiting)
            if self.rng.choice(moves) == "fork":
                number, forked = f"{at.prefix}{self.first + forked}", forked + 1
                waiting.append(number)
                written += self.write(item, replace(at, number=number, move="fork", names={}))
            else:
                written += self._wait(item, waiting, at)
                forked *= bool(waiting)
        while waiting:
            written += self._wait(item, waiting, at)
        return written

    def _wait(self, item: Expr, waiting: list[str], at: _At) -> str:
        if has_per_branch_items(self.grammar, item):
            at = replace(at, branches=len(waiting), move="wait")
            waiting.clear()
            return self.write(item, at)
        number = waiting.pop(self.rng.randrange(len(waiting)))
        return self.write(item, replace(at, number=number, move="wait"))

    def _per_branch_items(self, items: tuple[Expr, ...]) -> set[Expr]:
        return {
            i.item
            for i in items
            if isinstance(i, Repeat) and i.unbounded and not starts_block(self.grammar, i.item)
        }

    def _min_branches(self, expr: Expr) -> int:
        """The lowest number of branches with which an expression can be written."""
        match expr:
            case SymbolRef(name) if name in self.grammar.rules:
                return self._min_branches(self.grammar.rules[name])
            case SequenceExpr(items):
                per_branch = self._per_branch_items(items)
                own = sum(
                    i in per_branch or (isinstance(i, Repeat) and i.item in per_branch and i.min_count)
                    for i in items
                )
                return max(own, *(self._min_branches(i) for i in items if i not in per_branch))
            case Alt(options):
                return max(map(self._min_branches, options))
            case Repeat(item, low, many):
                return (
                    low
                    if many and not starts_block(self.grammar, item)
                    else 0
                    if many
                    else self._min_branches(item)
                )
        return 0

    def _fits(self, expr: Expr, at: _At) -> bool:
        """Whether an expression can be written with the levels that are left."""
        items = expr.items if isinstance(expr, SequenceExpr) else (expr,)
        return at.depth > 0 or not any(
            isinstance(i, Repeat) and i.min_count and i.unbounded and starts_block(self.grammar, i.item)
            for i in items
        )


def _is_tag(item: object) -> bool:
    return isinstance(item, StringLiteral) and item.is_tag
