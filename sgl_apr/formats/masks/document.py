"""A whole document lowered to llguidance, with its counts and numbers written out; phases are lowered in lowering.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sgl_apr.errors import GrammarError
from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar, merge_tag_parts
from sgl_apr.formats.lark_ast import Alt, Expr, Repeat, SequenceExpr, StringLiteral, SymbolRef
from sgl_apr.formats.masks.llguidance import LlguidanceWriter
from sgl_apr.formats.masks.writer import (
    FORK,
    WAIT,
    Backend,
    FlatSequence,
    Item,
    MaskOptions,
    OptionalText,
    Ref,
    RuleMarker,
)
from sgl_apr.tokenizer import Tokenizer

MAX_RULES = 5000  # beyond this, compiling the mask takes longer than anyone waits


@dataclass(frozen=True, slots=True)
class DocumentContext:
    """Where in the document: the branch's number, the prefix of those in it, and what it may hold.

    `branches` is how many the block at hand has, and `depth` how many levels of blocks are left.
    """

    depth: int
    number: str = ""
    prefix: str = ""
    branches: int = 0


def lower_document(
    grammar: Grammar, rule: str, tokenizer: Tokenizer, shape: MaskOptions, backend: Backend = "llguidance"
) -> str:
    """llguidance's text for a whole document, branches and joins included, that one request can decode.

    A block is one alternative for each number of branches, which has as many outlines, branches and
    results with the same numbers; where a fork makes one branch and the trunk waits for it later, every
    set of branches that are waited for is a rule. Of `shape`, `width`, `min_width`, `first`, `depth` and
    `forbid_angle_brackets` count. That a result names the node of its outline is beyond a context-free grammar and left
    to `Dialect.validate`. Raises `GrammarError` for any other option and for xgrammar, for a tag that is
    not one token (text before a rule cannot end at a tag that is spelled out in it), and where it gets
    too big.
    """
    if backend != "llguidance":
        raise GrammarError(
            f"{grammar.name}: a whole document is lowered to llguidance only, not to {backend}"
        )
    known = MaskOptions(
        shape.min_width,
        shape.width,
        first_number=shape.first_number,
        depth=shape.depth,
        forbid_angle_brackets=shape.forbid_angle_brackets,
    )
    if shape != known:
        raise GrammarError(
            f"{grammar.name}: a whole document takes width, min_width, first_number, depth and forbid_angle_brackets only"
        )
    writer = _Document(grammar, tokenizer, shape)
    try:
        return writer.write(writer.ways(SymbolRef(rule), DocumentContext(shape.depth)))
    except RecursionError:
        raise GrammarError(f"{grammar.name}: rule {rule!r} holds itself other than by * or +") from None


class _Document(LlguidanceWriter):
    """Writes the rules of a document; rules with the same content are one."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, shape: MaskOptions) -> None:
        super().__init__(grammar, tokenizer, shape)
        self.known: dict[str, str] = {}
        self.found: dict[tuple[Expr, DocumentContext], list[FlatSequence]] = {}
        self.states: dict[tuple[Expr, DocumentContext, int, tuple[int, ...]], Ref] = {}

    def sequence(self, flat: FlatSequence, number: str = "", *, outline: bool = False) -> str:
        return super().sequence(
            tuple(merge_tag_parts([i for i in flat if not isinstance(i, RuleMarker)], number)), ""
        )

    def text(
        self, rest: list[Item], *, optional: bool = False, most: int | None = None, line: bool = False
    ) -> str:
        # A rule begins with a token, so text before it ends as it does at the end.
        following = [] if rest and isinstance(rest[0], Ref) else rest
        return super().text(following, optional=optional, most=most, line=line)

    def literal(self, text: str) -> str:
        if text.endswith(">") and StringLiteral(text).is_tag:
            self._want_token(text)
        return super().literal(text)

    def _want_token(self, text: str) -> None:
        if self.token(text) is None:
            raise GrammarError(
                f"{self.grammar.name}: {text!r} is not one token, as every tag of a whole document has to be"
            )

    def rule(self, name: str, flats: Sequence[FlatSequence], *, behind_text: bool = True) -> Ref:
        """A rule with these alternatives."""
        for flat in flats if behind_text else ():
            first = merge_tag_parts([i for i in flat if not isinstance(i, RuleMarker)], "")[:1]
            if first and isinstance(first[0], StringLiteral) and first[0].is_tag:
                self._want_token(first[0].text)
        body = " | ".join(dict.fromkeys(self.sequence(flat) for flat in flats))
        if body not in self.known:
            self.known[body] = f"{name}_{len(self.known)}"
            self.lines[self.known[body]] = body
        if len(self.lines) > MAX_RULES:
            raise GrammarError(
                f"{self.grammar.name}: a document {self.shape.width} wide and {self.shape.depth} deep "
                f"takes more than {MAX_RULES} rules"
            )
        return Ref(self.known[body])

    def ways(self, expr: Expr, at: DocumentContext) -> list[FlatSequence]:
        """Every way through `expr`, for every number of branches that its block may have."""
        if (expr, at) not in self.found:
            self.found[expr, at] = self._ways(expr, at)
        return self.found[expr, at]

    def _ways(self, expr: Expr, at: DocumentContext) -> list[FlatSequence]:
        if not has_per_branch_items(self.grammar, expr):
            return self.flats(expr, at)
        widths = range(self.shape.min_width, self.shape.width + 1)
        found = [flat for n in widths for flat in self.flats(expr, replace(at, branches=n))]
        if not found:
            raise GrammarError(
                f"{self.grammar.name}: a block of {widths.start} to {widths.stop - 1} cannot be written"
            )
        return found

    def flats(self, expr: Expr, at: DocumentContext) -> list[FlatSequence]:
        """Every way through `expr` as a flat sequence."""
        match expr:
            case SymbolRef(name) if name == NUMBER:
                return [(StringLiteral(at.number),)]
            case SymbolRef(name) if name in self.grammar.rules or name.islower():
                mark: FlatSequence = (RuleMarker(name),) if name in ("fork", "wait") else ()
                return [mark + flat for flat in self.flats(self.grammar.rule(name), at)]
            case Alt(options):
                return [flat for option in options for flat in self.flats(option, at)]
            case SequenceExpr(items):
                return self.in_order(items, at)
            case Repeat(SymbolRef(name), many=False) if name == TEXT:
                return [(OptionalText(),)]
            case Repeat(item, low, many=False):
                return ([] if low else [()]) + self.flats(item, at)
            case Repeat(item) if not starts_block(self.grammar, item):
                return self.in_order((expr,), at)
            case Repeat(item, low):
                if not at.depth:
                    return [] if low else [()]
                inside = replace(at, depth=at.depth - 1)
                block = (
                    self.pending_branches_rule(item, inside, 0, ())
                    if "wait" in self.grammar.rules
                    else self.rule("block", self.ways(item, inside))
                )
                return [(Ref(block.name + ("+" if low else "*")),)]
            case StringLiteral() | SymbolRef():
                return [(expr,)]

    def in_order(self, items: Sequence[Expr], at: DocumentContext) -> list[FlatSequence]:
        """Items one after another; what is counted is there once for each branch, with its number."""
        counted = {
            i.item
            for i in items
            if isinstance(i, Repeat) and i.many and not starts_block(self.grammar, i.item)
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
        ways: list[FlatSequence] = [()]
        for expr, k in reversed(placed):
            ways = (
                self.branch(expr, k, ways, at) if k else [f + w for f in self.flats(expr, at) for w in ways]
            )
        return ways

    def branch(
        self, expr: Expr, k: int, following: list[FlatSequence], at: DocumentContext
    ) -> list[FlatSequence]:
        """Item `k` of what is counted, before what follows it."""
        number = f"{at.prefix}{self.shape.first_number + k - 1}"
        flats = self.ways(expr, DocumentContext(at.depth, number, f"{number}."))
        if all(f[-1:] not in ((SymbolRef(TEXT),), (OptionalText(),)) for f in flats):
            item = self.rule("item", flats)
            return [(item, *way) for way in following]
        # Text ends within its sequence, at the tag that follows: so that stands in the same one.
        ways: list[FlatSequence] = []
        for flat in (tuple(merge_tag_parts(f, "")) for f in flats):
            if flat[-1] in (SymbolRef(TEXT), OptionalText()):
                rests = [self.rule("rest", [way[1:]], behind_text=False) for way in following]
                ways += [(*flat, *way[:1], rest) for way, rest in zip(following, rests, strict=True)]
            else:
                ways.append((*flat, self.rule("rest", following, behind_text=False)))
        return ways

    def pending_branches_rule(
        self, item: Expr, at: DocumentContext, forked: int, waiting: tuple[int, ...]
    ) -> Ref:
        """The text from where `forked` branches are forked off, and these are waited for, to where none is."""
        state = (item, at, forked, waiting)
        if state not in self.states:
            self.states[state] = self.rule("ahead", self._moves(*state))
        return self.states[state]

    def _moves(
        self, item: Expr, at: DocumentContext, forked: int, waiting: tuple[int, ...]
    ) -> list[FlatSequence]:
        ways: list[FlatSequence] = []
        if forked < self.shape.width:
            forks = self.flats(item, replace(at, number=f"{at.prefix}{self.shape.first_number + forked}"))
            after = self.pending_branches_rule(item, at, forked + 1, (*waiting, forked))
            ways += [(*flat, after) for flat in forks if FORK in flat]
        if waiting and has_per_branch_items(self.grammar, item):
            ways += [f for f in self.flats(item, replace(at, branches=len(waiting))) if WAIT in f]
        else:
            for k in waiting:
                left = tuple(w for w in waiting if w != k)
                rest: FlatSequence = (self.pending_branches_rule(item, at, forked, left),) if left else ()
                joins = self.flats(item, replace(at, number=f"{at.prefix}{self.shape.first_number + k}"))
                ways += [flat + rest for flat in joins if WAIT in flat]
        return ways


def has_per_branch_items(grammar: Grammar, expr: Expr) -> bool:
    """Whether there is one of something in `expr` for each branch of one block."""
    match expr:
        case SymbolRef(name) if name in grammar.rules:
            return has_per_branch_items(grammar, grammar.rules[name])
        case SequenceExpr(parts) | Alt(parts):
            return any(has_per_branch_items(grammar, part) for part in parts)
        case Repeat(item, many=many):
            return not starts_block(grammar, item) if many else has_per_branch_items(grammar, item)
    return False


def starts_block(grammar: Grammar, expr: Expr, to: Sequence[str] = ("fork", "wait")) -> bool:
    """Whether `expr` begins a block or waits for one, perhaps behind text: what may come any number of times."""
    match expr:
        case SymbolRef(name):
            return name in to or (name in grammar.rules and starts_block(grammar, grammar.rules[name], to))
        case SequenceExpr(items):
            first = next(
                (i for i in items if i not in (SymbolRef(TEXT), Repeat(SymbolRef(TEXT), 0, False))), None
            )
            return first is not None and starts_block(grammar, first, to)
        case Alt(options):
            return any(starts_block(grammar, option, to) for option in options)
        case Repeat(item):
            return starts_block(grammar, item, to)
    return False
