"""Lowers a complete reply, with all of its branches and joins, to one llguidance grammar.

With it a stock engine can decode a complete reply sequentially in one request, in any dialect, without the runtime.
The runtime itself decodes phase by phase, with the masks of `sgl_apr.formats.masks.lower`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sgl_apr.errors import GrammarError
from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar, merge_tag_parts
from sgl_apr.formats.grammar_checks import check_expansion
from sgl_apr.formats.lark_ast import Alt, Expr, Repeat, SequenceExpr, StringLiteral, SymbolRef
from sgl_apr.formats.masks.llguidance import LlguidanceWriter
from sgl_apr.formats.masks.writer import (
    FORK,
    WAIT,
    FlatSequence,
    GrammarBackend,
    Item,
    MaskOptions,
    OptionalText,
    RuleMarker,
    RuleRef,
)
from sgl_apr.tokenizer import Tokenizer

MAX_RULES = 5000  # a grammar with more rules takes too long to compile


@dataclass(frozen=True, slots=True)
class DocumentContext:
    """A position in the structure of a document.

    Attributes:
        depth: How many more levels of blocks can be opened.
        number: The number of the branch.
        prefix: The prefix of the numbers of its own branches.
        branches: How many branches the current block has.
    """

    depth: int
    number: str = ""
    prefix: str = ""
    branches: int = 0


def lower_document(
    grammar: Grammar,
    rule: str,
    tokenizer: Tokenizer,
    options: MaskOptions,
    backend: GrammarBackend = "llguidance",
) -> str:
    """Return llguidance's text for a complete document, which one request can decode.

    A block has one alternative for each number of branches, with as many outlines, branches and results of the same
    numbers. In a dialect that forks one branch at a time, every set of branches that the trunk still waits for is a
    rule. A context-free grammar cannot express that a result names the node of its outline, so `Dialect.validate`
    checks that.

    Args:
        grammar: The grammar.
        rule: The rule of a complete document.
        tokenizer: The tokenizer of the model. Every tag has to be one token, because text before a rule cannot
            end at a tag that is spelled out in that rule.
        options: Of these, `width`, `min_width`, `first_number`, `depth` and `forbid_angle_brackets` are supported.
        backend: Has to be llguidance.

    Raises:
        GrammarError: Another option or backend is requested, a tag is not one token, or the grammar gets too large.
    """
    if backend != "llguidance":
        raise GrammarError(f"{grammar.name}: a complete document needs llguidance, not {backend}")
    supported = MaskOptions(
        options.min_width,
        options.width,
        first_number=options.first_number,
        depth=options.depth,
        forbid_angle_brackets=options.forbid_angle_brackets,
    )
    if options != supported:
        raise GrammarError(
            f"{grammar.name}: a complete document supports the options width, min_width, first_number, depth and "
            "forbid_angle_brackets only"
        )
    check_expansion(grammar.rules, rule, grammar.name)
    writer = _DocumentWriter(grammar, tokenizer, options)
    try:
        return writer.write(writer.alternatives(SymbolRef(rule), DocumentContext(options.depth)))
    except RecursionError:
        raise GrammarError(
            f"{grammar.name}: rule {rule!r} is recursive, expected recursion by * or + only"
        ) from None


class _DocumentWriter(LlguidanceWriter):
    """Writes the rules of a document. Rules with the same body are one rule."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, options: MaskOptions) -> None:
        super().__init__(grammar, tokenizer, options)
        self._names: dict[str, str] = {}  # of rules, by their bodies
        self._alternatives: dict[tuple[Expr, DocumentContext], list[FlatSequence]] = {}
        self._pending: dict[tuple[Expr, DocumentContext, int, tuple[int, ...]], RuleRef] = {}

    def sequence(self, flat: FlatSequence, number: str = "", *, outline: bool = False) -> str:
        return super().sequence(
            tuple(merge_tag_parts([i for i in flat if not isinstance(i, RuleMarker)], number)), ""
        )

    def text(
        self,
        rest: list[Item],
        *,
        optional: bool = False,
        max_chars: int | None = None,
        single_line: bool = False,
    ) -> str:
        # A rule begins with a token, so text before a rule ends in the same way as at the end.
        following = [] if rest and isinstance(rest[0], RuleRef) else rest
        return super().text(following, optional=optional, max_chars=max_chars, single_line=single_line)

    def literal(self, text: str) -> str:
        if text.endswith(">") and StringLiteral(text).is_tag:
            self._require_token(text)
        return super().literal(text)

    def _require_token(self, text: str) -> None:
        if self.token(text) is None:
            raise GrammarError(
                f"{self.grammar.name}: {text!r} is not one token, as every tag of a complete document has to be"
            )

    def rule(self, name: str, flats: Sequence[FlatSequence], *, follows_text: bool = True) -> RuleRef:
        """Write a rule with these alternatives and return a reference to it."""
        for flat in flats if follows_text else ():
            first = merge_tag_parts([i for i in flat if not isinstance(i, RuleMarker)], "")[:1]
            if first and isinstance(first[0], StringLiteral) and first[0].is_tag:
                self._require_token(first[0].text)
        body = " | ".join(dict.fromkeys(self.sequence(flat) for flat in flats))
        if body not in self._names:
            self._names[body] = f"{name}_{len(self._names)}"
            self.lines[self._names[body]] = body
        if len(self.lines) > MAX_RULES:
            raise GrammarError(
                f"{self.grammar.name}: a document {self.options.width} wide and {self.options.depth} deep "
                f"needs more than {MAX_RULES} rules"
            )
        return RuleRef(self._names[body])

    def alternatives(self, expr: Expr, context: DocumentContext) -> list[FlatSequence]:
        """Return every alternative of an expression, for every number of branches that its block can have."""
        if (expr, context) not in self._alternatives:
            self._alternatives[expr, context] = self._expand_widths(expr, context)
        return self._alternatives[expr, context]

    def _expand_widths(self, expr: Expr, context: DocumentContext) -> list[FlatSequence]:
        if not has_per_branch_items(self.grammar, expr):
            return self.flatten(expr, context)
        widths = range(self.options.min_width, self.options.width + 1)
        flats = [flat for n in widths for flat in self.flatten(expr, replace(context, branches=n))]
        if not flats:
            raise GrammarError(
                f"{self.grammar.name}: a block cannot have {widths.start} to {widths.stop - 1} branches"
            )
        return flats

    def flatten(self, expr: Expr, context: DocumentContext) -> list[FlatSequence]:
        """Return every alternative of an expression for the context's number of branches."""
        match expr:
            case SymbolRef(name) if name == NUMBER:
                return [(StringLiteral(context.number),)]
            case SymbolRef(name) if name in self.grammar.rules or name.islower():
                marker: FlatSequence = (RuleMarker(name),) if name in ("fork", "wait") else ()
                return [marker + flat for flat in self.flatten(self.grammar.rule(name), context)]
            case Alt(options):
                return [flat for option in options for flat in self.flatten(option, context)]
            case SequenceExpr(items):
                return self.flatten_sequence(items, context)
            case Repeat(SymbolRef(name), unbounded=False) if name == TEXT:
                return [(OptionalText(),)]
            case Repeat(item, min_count, unbounded=False):
                return ([] if min_count else [()]) + self.flatten(item, context)
            case Repeat(item) if not starts_block(self.grammar, item):
                return self.flatten_sequence((expr,), context)
            case Repeat(item, min_count):
                if not context.depth:
                    return [] if min_count else [()]
                inside = replace(context, depth=context.depth - 1)
                block = (
                    self.pending_branches_rule(item, inside, 0, ())
                    if "wait" in self.grammar.rules
                    else self.rule("block", self.alternatives(item, inside))
                )
                return [(RuleRef(block.name + ("+" if min_count else "*")),)]
            case StringLiteral() | SymbolRef():
                return [(expr,)]

    def flatten_sequence(self, items: Sequence[Expr], context: DocumentContext) -> list[FlatSequence]:
        """Return every alternative of a sequence. Per-branch items occur once for each branch, with its number."""
        per_branch = {
            i.item
            for i in items
            if isinstance(i, Repeat) and i.unbounded and not starts_block(self.grammar, i.item)
        }
        single = sum(i in per_branch for i in items)  # such as the first path in `path path+`
        expanded: list[tuple[Expr, int]] = []  # with the index of the branch from 1, or 0 for other items
        for item in items:
            branches_before = len([k for _, k in expanded if k])
            if isinstance(item, Repeat) and item.item in per_branch:
                if context.branches - single < item.min_count:
                    return []
                expanded += [
                    (item.item, branches_before + k) for k in range(1, context.branches - single + 1)
                ]
            else:
                expanded.append((item, 1 + branches_before if item in per_branch else 0))
        flats: list[FlatSequence] = [()]
        for expr, k in reversed(expanded):
            if k:
                flats = self.branch(expr, k, flats, context)
            else:
                flats = [f + rest for f in self.flatten(expr, context) for rest in flats]
        return flats

    def branch(
        self, expr: Expr, k: int, following: list[FlatSequence], context: DocumentContext
    ) -> list[FlatSequence]:
        """Return the alternatives of the k-th per-branch item and of what follows it."""
        number = f"{context.prefix}{self.options.first_number + k - 1}"
        flats = self.alternatives(expr, DocumentContext(context.depth, number, f"{number}."))
        if all(f[-1:] not in ((SymbolRef(TEXT),), (OptionalText(),)) for f in flats):
            item = self.rule("item", flats)
            return [(item, *rest) for rest in following]
        # Text ends at a tag of its own sequence, so the first item that follows has to be in the same sequence.
        joined: list[FlatSequence] = []
        for flat in (tuple(merge_tag_parts(f, "")) for f in flats):
            if flat[-1] in (SymbolRef(TEXT), OptionalText()):
                rests = [self.rule("rest", [rest[1:]], follows_text=False) for rest in following]
                joined += [(*flat, *rest[:1], ref) for rest, ref in zip(following, rests, strict=True)]
            else:
                joined.append((*flat, self.rule("rest", following, follows_text=False)))
        return joined

    def pending_branches_rule(
        self, item: Expr, context: DocumentContext, forked: int, waiting: tuple[int, ...]
    ) -> RuleRef:
        """Return the rule of the text from a state of pending branches to where none is pending.

        Args:
            item: The repeated expression, which forks or waits.
            context: Where it stands.
            forked: How many branches have been forked off.
            waiting: The indices of those that have not been waited for.
        """
        state = (item, context, forked, waiting)
        if state not in self._pending:
            self._pending[state] = self.rule("pending", self._next_steps(*state))
        return self._pending[state]

    def _next_steps(
        self, item: Expr, context: DocumentContext, forked: int, waiting: tuple[int, ...]
    ) -> list[FlatSequence]:
        """The alternatives of a state of pending branches: another fork, or a wait."""

        def numbered(index: int) -> list[FlatSequence]:
            number = f"{context.prefix}{self.options.first_number + index}"
            return self.flatten(item, replace(context, number=number))

        steps: list[FlatSequence] = []
        if forked < self.options.width:
            forks = numbered(forked)
            rest = self.pending_branches_rule(item, context, forked + 1, (*waiting, forked))
            steps += [(*flat, rest) for flat in forks if FORK in flat]
        if waiting and has_per_branch_items(self.grammar, item):
            steps += [f for f in self.flatten(item, replace(context, branches=len(waiting))) if WAIT in f]
        else:
            for k in waiting:
                left = tuple(w for w in waiting if w != k)
                after = (self.pending_branches_rule(item, context, forked, left),) if left else ()
                steps += [flat + after for flat in numbered(k) if WAIT in flat]
        return steps


def has_per_branch_items(grammar: Grammar, expr: Expr) -> bool:
    """Return whether an expression holds something that occurs once for each branch of one block."""
    match expr:
        case SymbolRef(name) if name in grammar.rules:
            return has_per_branch_items(grammar, grammar.rules[name])
        case SequenceExpr(parts) | Alt(parts):
            return any(has_per_branch_items(grammar, part) for part in parts)
        case Repeat(item, unbounded=unbounded):
            return not starts_block(grammar, item) if unbounded else has_per_branch_items(grammar, item)
    return False


def starts_block(grammar: Grammar, expr: Expr, rules: Sequence[str] = ("fork", "wait")) -> bool:
    """Return whether an expression begins with one of some rules, perhaps after text.

    With the default rules this is what a document repeats any number of times: blocks, and waits for branches.
    """
    match expr:
        case SymbolRef(name):
            return name in rules or (
                name in grammar.rules and starts_block(grammar, grammar.rules[name], rules)
            )
        case SequenceExpr(items):
            first = next(
                (i for i in items if i not in (SymbolRef(TEXT), Repeat(SymbolRef(TEXT), 0, False))), None
            )
            return first is not None and starts_block(grammar, first, rules)
        case Alt(options):
            return any(starts_block(grammar, option, rules) for option in options)
        case Repeat(item):
            return starts_block(grammar, item, rules)
    return False
