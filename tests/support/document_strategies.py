"""Valid documents of any dialect, made from its grammar alone, and what breaks them; no dialect is named here."""

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
    """Whole valid replies."""
    return st.randoms(use_true_random=False).map(lambda rng: document(dialect, rng, width, depth))


def document(dialect: apr.Dialect, rng: random.Random, width: int = 3, depth: int = 2) -> str:
    """One of them: blocks of at most `width` branches, nested at most `depth` deep if the dialect nests."""
    author = _Author(dialect.grammar, rng, min(width, dialect.max_width), dialect.first_number)
    return author.write(SymbolRef("trace"), _At(min(depth, dialect.max_depth)))


def tags(dialect: apr.Dialect, text: str, *, named: bool = False) -> list[re.Match[str]]:
    """What stands in `text` that free text may not hold, numbers included; with `named`, names as well.

    `<promise topic="` is such a tag, and the topic is what it says; with `named` it is all up to `>`.
    """
    found = {t.text for seq in dialect.grammar._sequences() for t in merge_tag_parts(seq, "\0") if _is_tag(t)}
    patterns = (re.escape(t).replace("\0", r"[0-9.]+") for t in sorted(found, key=len, reverse=True))
    return list(
        re.finditer("|".join(p if not named or p.endswith(">") else p + "[^<>]*>" for p in patterns), text)
    )


def without_a_tag(dialect: apr.Dialect, text: str) -> Iterator[str]:
    """`text` without one of its tags, each in turn."""
    for named in (False, True):
        for tag in tags(dialect, text, named=named):
            yield text[: tag.start()] + text[tag.end() :]


def with_tags_swapped(dialect: apr.Dialect, text: str, *, named: bool = False) -> Iterator[str]:
    """`text` with two tags swapped that are different and next to one another, each pair in turn."""
    for a, b in pairwise(tags(dialect, text, named=named)):
        if a[0] != b[0]:
            swapped = text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]
            if swapped != text:
                yield swapped


def free_text(grammar: Grammar, rng: random.Random) -> str:
    """Anything a model may write that is no tag, does not pass for one, and is not just the beginnings of tags."""
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
        says = re.sub(rf"</?(?:{begun}|)", "", text, flags=re.IGNORECASE)
        if says and not re.search(rf"</?(?:{names})", text, re.IGNORECASE):
            return text


@dataclass(frozen=True)
class _At:
    """Where in the document: levels of blocks left, the number of the branch, and what its block has.

    `names` are those that the block gave to its branches; `move` is "fork" or "wait" where one of them
    has to come.
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

    def open(self, expr: Expr, at: _At) -> str:
        """`expr` in which a new block may have its branches."""
        if not has_per_branch_items(self.grammar, expr):
            return self.write(expr, at)
        low = self._least(expr)
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
                return (self.open if name == "trace" else self.write)(rules[name], at)
            case SymbolRef(name):
                terminal = self.grammar.terminals[name]
                if isinstance(terminal, StringLiteral):
                    return terminal.text
                fitting = [n for n in NAMES if re.fullmatch(terminal, n)]
                return at.names.setdefault(at.number, rng.choice(fitting))
            case SequenceExpr(items):
                return self.in_order(items, at)
            case Alt(options):
                wanted = [o for o in options if at.move and starts_block(self.grammar, o, (at.move,))]
                return self.write(rng.choice(wanted or [o for o in options if self._fits(o, at)]), at)
            case Repeat(item, low, unbounded=False):
                return self.write(item, at) if low or rng.random() < 0.6 else ""
            case Repeat(item, low) if starts_block(self.grammar, item):
                return self.blocks(item, low, at)
            case Repeat():
                return self.in_order((expr,), at)

    def in_order(self, items: tuple[Expr, ...], at: _At) -> str:
        """Items one after another, what is counted once for each branch."""
        counted = self._counted(items)
        once = sum(i in counted for i in items)
        written, k = "", 0
        for item in items:
            branch = item.item if isinstance(item, Repeat) else item
            if branch not in counted:
                written += self.write(item, at)
                continue
            for _ in range(at.branches - once if isinstance(item, Repeat) else 1):
                number = f"{at.prefix}{self.first + k}"
                inside = replace(at, number=number, prefix=f"{number}.")
                written, k = written + self.write(branch, inside), k + 1
        return written

    def blocks(self, item: Expr, low: int, at: _At) -> str:
        """What may come any number of times; what was forked off is waited for."""
        at = replace(at, depth=at.depth - 1, names={})
        times = self.rng.randint(low, max(low, 2)) if at.depth >= 0 else 0
        if "wait" not in self.grammar.rules:
            return "".join(self.open(item, at) for _ in range(times))
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

    def _counted(self, items: tuple[Expr, ...]) -> set[Expr]:
        return {
            i.item
            for i in items
            if isinstance(i, Repeat) and i.unbounded and not starts_block(self.grammar, i.item)
        }

    def _least(self, expr: Expr) -> int:
        """The fewest branches with which `expr` can be written."""
        match expr:
            case SymbolRef(name) if name in self.grammar.rules:
                return self._least(self.grammar.rules[name])
            case SequenceExpr(items):
                counted = self._counted(items)
                own = sum(
                    i in counted or (isinstance(i, Repeat) and i.item in counted and i.min_count) for i in items
                )
                return max(own, *(self._least(i) for i in items if i not in counted))
            case Alt(options):
                return max(map(self._least, options))
            case Repeat(item, low, many):
                return (
                    low if many and not starts_block(self.grammar, item) else 0 if many else self._least(item)
                )
        return 0

    def _fits(self, expr: Expr, at: _At) -> bool:
        """Whether it can be written with the levels that are left."""
        items = expr.items if isinstance(expr, SequenceExpr) else (expr,)
        return at.depth > 0 or not any(
            isinstance(i, Repeat) and i.min_count and i.unbounded and starts_block(self.grammar, i.item) for i in items
        )


def _is_tag(item: object) -> bool:
    return isinstance(item, StringLiteral) and item.is_tag
