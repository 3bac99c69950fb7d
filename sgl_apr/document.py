"""A whole document lowered to llguidance, with its counts and numbers written out; phases are lowered in lowering.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sgl_apr.errors import GrammarError
from sgl_apr.expressions import Alt, Expr, Literal, Name, Repeat, Seq
from sgl_apr.grammar import NUMBER, TEXT, Grammar, join_tags
from sgl_apr.lowering import FORK, WAIT, Backend, Flat, Item, Mark, MaybeText, Ref, Shape
from sgl_apr.lowering_llguidance import LlguidanceWriter
from sgl_apr.tokenizer import Tokenizer

MOST_RULES = 5000  # beyond this, compiling the mask takes longer than anyone waits


@dataclass(frozen=True, slots=True)
class Scope:
    """Where in the document: the branch's number, the prefix of those in it, and what it may hold.

    `branches` is how many the block at hand has, and `depth` how many levels of blocks are left.
    """

    depth: int
    number: str = ""
    prefix: str = ""
    branches: int = 0


def lower_document(
    grammar: Grammar, rule: str, tokenizer: Tokenizer, shape: Shape, backend: Backend = "llguidance"
) -> str:
    """llguidance's text for a whole document, branches and joins included, that one request can decode.

    A block is one alternative for each number of branches, which has as many outlines, branches and
    results with the same numbers; where a fork makes one branch and the trunk waits for it later, every
    set of branches that are waited for is a rule. Of `shape`, `width`, `min_width`, `first`, `depth` and
    `plain` count. That a result names the node of its outline is beyond a context-free grammar and left
    to `Dialect.validate`. Raises `GrammarError` for any other option and for xgrammar, for a tag that is
    not one token (text before a rule cannot end at a tag that is spelled out in it), and where it gets
    too big.
    """
    if backend != "llguidance":
        raise GrammarError(
            f"{grammar.name}: a whole document is lowered to llguidance only, not to {backend}"
        )
    known = Shape(shape.min_width, shape.width, first=shape.first, depth=shape.depth, plain=shape.plain)
    if shape != known:
        raise GrammarError(
            f"{grammar.name}: a whole document takes width, min_width, first, depth and plain only"
        )
    writer = _Document(grammar, tokenizer, shape)
    try:
        return writer.write(writer.ways(Name(rule), Scope(shape.depth)))
    except RecursionError:
        raise GrammarError(f"{grammar.name}: rule {rule!r} holds itself other than by * or +") from None


class _Document(LlguidanceWriter):
    """Writes the rules of a document; rules with the same content are one."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, shape: Shape) -> None:
        super().__init__(grammar, tokenizer, shape)
        self.known: dict[str, str] = {}
        self.found: dict[tuple[Expr, Scope], list[Flat]] = {}
        self.states: dict[tuple[Expr, Scope, int, tuple[int, ...]], Ref] = {}

    def sequence(self, flat: Flat, number: str = "", *, outline: bool = False) -> str:
        return super().sequence(tuple(join_tags([i for i in flat if not isinstance(i, Mark)], number)), "")

    def text(
        self, rest: list[Item], *, optional: bool = False, most: int | None = None, line: bool = False
    ) -> str:
        # A rule begins with a token, so text before it ends as it does at the end.
        following = [] if rest and isinstance(rest[0], Ref) else rest
        return super().text(following, optional=optional, most=most, line=line)

    def fixed(self, text: str) -> str:
        if text.endswith(">") and Literal(text).is_tag:
            self._want_token(text)
        return super().fixed(text)

    def _want_token(self, text: str) -> None:
        if self.token(text) is None:
            raise GrammarError(
                f"{self.grammar.name}: {text!r} is not one token, as every tag of a whole document has to be"
            )

    def rule(self, name: str, flats: Sequence[Flat], *, behind_text: bool = True) -> Ref:
        """A rule with these alternatives."""
        for flat in flats if behind_text else ():
            first = join_tags([i for i in flat if not isinstance(i, Mark)], "")[:1]
            if first and isinstance(first[0], Literal) and first[0].is_tag:
                self._want_token(first[0].text)
        body = " | ".join(dict.fromkeys(self.sequence(flat) for flat in flats))
        if body not in self.known:
            self.known[body] = f"{name}_{len(self.known)}"
            self.lines[self.known[body]] = body
        if len(self.lines) > MOST_RULES:
            raise GrammarError(
                f"{self.grammar.name}: a document {self.shape.width} wide and {self.shape.depth} deep "
                f"takes more than {MOST_RULES} rules"
            )
        return Ref(self.known[body])

    def ways(self, expr: Expr, at: Scope) -> list[Flat]:
        """Every way through `expr`, for every number of branches that its block may have."""
        if (expr, at) not in self.found:
            self.found[expr, at] = self._ways(expr, at)
        return self.found[expr, at]

    def _ways(self, expr: Expr, at: Scope) -> list[Flat]:
        if not counts(self.grammar, expr):
            return self.flats(expr, at)
        widths = range(self.shape.min_width, self.shape.width + 1)
        found = [flat for n in widths for flat in self.flats(expr, replace(at, branches=n))]
        if not found:
            raise GrammarError(
                f"{self.grammar.name}: a block of {widths.start} to {widths.stop - 1} cannot be written"
            )
        return found

    def flats(self, expr: Expr, at: Scope) -> list[Flat]:
        """Every way through `expr` as a flat sequence."""
        match expr:
            case Name(name) if name == NUMBER:
                return [(Literal(at.number),)]
            case Name(name) if name in self.grammar.rules or name.islower():
                mark: Flat = (Mark(name),) if name in ("fork", "wait") else ()
                return [mark + flat for flat in self.flats(self.grammar.rule(name), at)]
            case Alt(options):
                return [flat for option in options for flat in self.flats(option, at)]
            case Seq(items):
                return self.in_order(items, at)
            case Repeat(Name(name), many=False) if name == TEXT:
                return [(MaybeText(),)]
            case Repeat(item, low, many=False):
                return ([] if low else [()]) + self.flats(item, at)
            case Repeat(item) if not leads(self.grammar, item):
                return self.in_order((expr,), at)
            case Repeat(item, low):
                if not at.depth:
                    return [] if low else [()]
                inside = replace(at, depth=at.depth - 1)
                block = (
                    self.ahead(item, inside, 0, ())
                    if "wait" in self.grammar.rules
                    else self.rule("block", self.ways(item, inside))
                )
                return [(Ref(block.name + ("+" if low else "*")),)]
            case Literal() | Name():
                return [(expr,)]

    def in_order(self, items: Sequence[Expr], at: Scope) -> list[Flat]:
        """Items one after another; what is counted is there once for each branch, with its number."""
        counted = {
            i.item for i in items if isinstance(i, Repeat) and i.many and not leads(self.grammar, i.item)
        }
        once = sum(i in counted for i in items)
        placed: list[tuple[Expr, int]] = []  # 0 for what is no branch
        for item in items:
            if isinstance(item, Repeat) and item.item in counted:
                if at.branches - once < item.low:
                    return []
                done = len([k for _, k in placed if k])
                placed += [(item.item, done + k) for k in range(1, at.branches - once + 1)]
            else:
                placed.append((item, 1 + len([k for _, k in placed if k]) if item in counted else 0))
        ways: list[Flat] = [()]
        for expr, k in reversed(placed):
            ways = (
                self.branch(expr, k, ways, at) if k else [f + w for f in self.flats(expr, at) for w in ways]
            )
        return ways

    def branch(self, expr: Expr, k: int, following: list[Flat], at: Scope) -> list[Flat]:
        """Item `k` of what is counted, before what follows it."""
        number = f"{at.prefix}{self.shape.first + k - 1}"
        flats = self.ways(expr, Scope(at.depth, number, f"{number}."))
        if all(f[-1:] not in ((Name(TEXT),), (MaybeText(),)) for f in flats):
            item = self.rule("item", flats)
            return [(item, *way) for way in following]
        # Text ends within its sequence, at the tag that follows: so that stands in the same one.
        ways: list[Flat] = []
        for flat in (tuple(join_tags(f, "")) for f in flats):
            if flat[-1] in (Name(TEXT), MaybeText()):
                rests = [self.rule("rest", [way[1:]], behind_text=False) for way in following]
                ways += [(*flat, *way[:1], rest) for way, rest in zip(following, rests, strict=True)]
            else:
                ways.append((*flat, self.rule("rest", following, behind_text=False)))
        return ways

    def ahead(self, item: Expr, at: Scope, forked: int, waiting: tuple[int, ...]) -> Ref:
        """The text from where `forked` branches are forked off, and these are waited for, to where none is."""
        state = (item, at, forked, waiting)
        if state not in self.states:
            self.states[state] = self.rule("ahead", self._moves(*state))
        return self.states[state]

    def _moves(self, item: Expr, at: Scope, forked: int, waiting: tuple[int, ...]) -> list[Flat]:
        ways: list[Flat] = []
        if forked < self.shape.width:
            forks = self.flats(item, replace(at, number=f"{at.prefix}{self.shape.first + forked}"))
            after = self.ahead(item, at, forked + 1, (*waiting, forked))
            ways += [(*flat, after) for flat in forks if FORK in flat]
        if waiting and counts(self.grammar, item):
            ways += [f for f in self.flats(item, replace(at, branches=len(waiting))) if WAIT in f]
        else:
            for k in waiting:
                left = tuple(w for w in waiting if w != k)
                rest: Flat = (self.ahead(item, at, forked, left),) if left else ()
                joins = self.flats(item, replace(at, number=f"{at.prefix}{self.shape.first + k}"))
                ways += [flat + rest for flat in joins if WAIT in flat]
        return ways


def counts(grammar: Grammar, expr: Expr) -> bool:
    """Whether there is one of something in `expr` for each branch of one block."""
    match expr:
        case Name(name) if name in grammar.rules:
            return counts(grammar, grammar.rules[name])
        case Seq(parts) | Alt(parts):
            return any(counts(grammar, part) for part in parts)
        case Repeat(item, many=many):
            return not leads(grammar, item) if many else counts(grammar, item)
    return False


def leads(grammar: Grammar, expr: Expr, to: Sequence[str] = ("fork", "wait")) -> bool:
    """Whether `expr` begins a block or waits for one, perhaps behind text: what may come any number of times."""
    match expr:
        case Name(name):
            return name in to or (name in grammar.rules and leads(grammar, grammar.rules[name], to))
        case Seq(items):
            first = next((i for i in items if i not in (Name(TEXT), Repeat(Name(TEXT), 0, False))), None)
            return first is not None and leads(grammar, first, to)
        case Alt(options):
            return any(leads(grammar, option, to) for option in options)
        case Repeat(item):
            return leads(grammar, item, to)
    return False
