"""A grammar rule written out for a grammar backend, which turns it into a token mask; how, is the backend's module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import product
from typing import Literal as OneOf

from sgl_apr.errors import GrammarError
from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar, merge_tag_parts
from sgl_apr.formats.lark_ast import Alt, Expr, Repeat, SequenceExpr, StringLiteral, SymbolRef
from sgl_apr.tokenizer import Tokenizer

Fork = OneOf["auto", "required", "forbidden"]
Backend = OneOf["llguidance", "xgrammar"]


@dataclass(frozen=True, slots=True)
class NumberedRepeat:
    """A numbered rule, `low` times or more: written out as item 1, item 2, ... so that counting cannot fail."""

    rule: str
    low: int


@dataclass(frozen=True, slots=True)
class RuleMarker:
    """In a flat sequence: here the rule begins that forks, or the one that waits for a branch."""

    rule: str


@dataclass(frozen=True, slots=True)
class OptionalText:
    """Optional free text, kept as one item: as two alternatives a lexer could not tell them apart in time."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A rule that is written already; it begins with one token, or behind what is no text."""

    name: str


Item = StringLiteral | SymbolRef | NumberedRepeat | RuleMarker | OptionalText | Ref
FlatSequence = tuple[Item, ...]
FORK, WAIT = RuleMarker("fork"), RuleMarker("wait")


@dataclass(frozen=True, slots=True)
class MaskOptions:
    """What one request may decode of its phase.

    A fork gets `min_width` to `width` branches, numbered `prefix` + `first`, ... without gaps; `fork`
    allows the phase to fork, makes it, or forbids it. `number` is that of the branch that decodes, or of
    the next one that is forked off; `waiting` are the branches that the trunk may still wait for, and
    has to before it ends. `lead_chars` bounds each text before a fork, and `outline_chars` makes each
    outline one short line. With `forbid_angle_brackets`, and in text that is bounded, there is no `<`, which keeps a
    small model from losing itself in tags of its own. `depth` is how deep blocks nest in a whole document.
    """

    min_width: int = 2
    width: int = 8
    fork: Fork = "auto"
    prefix: str = ""
    first_number: int = 1
    number: str = ""
    waiting: tuple[str, ...] = ()
    lead_chars: int | None = None
    outline_chars: int | None = None
    forbid_angle_brackets: bool = False
    depth: int = 1


def alternatives(grammar: Grammar, phase: str, shape: MaskOptions) -> list[FlatSequence]:
    """Every way through a phase that `shape` leaves, as flat sequences; raises `GrammarError` if there is none."""
    flats = list(dict.fromkeys(_flatten(grammar, SymbolRef(phase))))
    if shape.fork != "auto":
        flats = [f for f in flats if (FORK in f) == (shape.fork == "required")]
    flats = [f for f in flats if WAIT not in f or shape.waiting]
    if any(WAIT in f for f in flats):
        flats = [f for f in flats if FORK in f or WAIT in f]
    if not flats:
        raise GrammarError(f"{grammar.name}: phase {phase!r} with fork={shape.fork!r} allows nothing")
    # Where the model may go on, it does: an alternative that neither forks nor ends in text says nothing.
    speaking = [f for f in flats if FORK in f or f[-1:] == (SymbolRef(TEXT),)]
    return speaking if any(f[-1:] == (SymbolRef(TEXT),) for f in flats) else flats


def _flatten(grammar: Grammar, expr: Expr) -> list[FlatSequence]:
    """Every way through `expr` as a flat sequence; numbered repetitions stay folded as a `Chain`."""
    match expr:
        case SymbolRef(name) if name in grammar.rules or name.islower():
            mark: FlatSequence = (RuleMarker(name),) if name in ("fork", "wait") else ()
            return [mark + flat for flat in _flatten(grammar, grammar.rule(name))]
        case SequenceExpr(items):
            return [sum(parts, ()) for parts in product(*(_flatten(grammar, item) for item in items))]
        case Alt(options):
            return [flat for option in options for flat in _flatten(grammar, option)]
        case Repeat(SymbolRef(name), many=False) if name == TEXT:
            return [(OptionalText(),)]
        case Repeat(item, low, many=False):
            return ([] if low else [()]) + _flatten(grammar, item)
        case Repeat(SymbolRef(name), low) if name in grammar.rules and _is_numbered(grammar, name):
            return [(NumberedRepeat(name, low),)]
        case Repeat():
            raise GrammarError(f"{grammar.name}: a phase can repeat numbered rules only, not {expr.item}")
        case StringLiteral() | SymbolRef():
            return [(expr,)]


def _is_numbered(grammar: Grammar, rule: str) -> bool:
    return all(SymbolRef(NUMBER) in flat for flat in _flatten(grammar, SymbolRef(rule)))


class GrammarWriter(ABC):
    """Writes rules once each; the name of a rule is what makes it the same. How text is written is the backend's."""

    DEFINES = ": "
    START = "start"

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, shape: MaskOptions) -> None:
        self.grammar, self.shape, self.tokenizer = grammar, shape, tokenizer
        self.lines: dict[str, str] = {}

    def write(self, flats: list[FlatSequence]) -> str:
        shape = self.shape
        bodies: list[str] = []
        for flat in flats:
            for number in shape.waiting if WAIT in flat else (shape.number,):
                bodies.append(self.sequence(flat, number))
        body = " | ".join(dict.fromkeys(bodies))
        lines = [f"{name}{self.DEFINES}{rule}" for name, rule in {self.START: body, **self.lines}.items()]
        return "\n".join(lines) + "\n"

    def sequence(self, flat: FlatSequence, number: str, *, outline: bool = False) -> str:
        items = list(flat)
        before_fork = FORK in items
        words: list[str] = []
        items = merge_tag_parts(items, number) if number else items
        while items:
            most = self.shape.lead_chars if before_fork else None
            item = items.pop(0)
            match item:
                case RuleMarker(rule):
                    before_fork, outline = before_fork and rule != "fork", outline or rule == "fork"
                case OptionalText():
                    words.append(self.text(items, optional=True, most=most))
                case SymbolRef(name) if name == TEXT and outline:
                    words.append(self.text(items, most=self.shape.outline_chars, line=True))
                case SymbolRef(name) if name == TEXT:
                    words.append(self.text(items, most=most))
                case SymbolRef(name):
                    words.append(self.terminal(name))
                case StringLiteral(text):
                    words.append(self.literal(text))
                case NumberedRepeat(rule, low):
                    words.append(self.chain(rule, low))
                case Ref(name):
                    words.append(name)
        return " ".join(words) or '""'

    @abstractmethod
    def literal(self, text: str) -> str:
        """Fixed text, or a tag as its token."""

    @abstractmethod
    def pattern(self, name: str, regex: str) -> str:
        """A terminal that is a regular expression."""

    @abstractmethod
    def text(
        self, rest: list[Item], *, optional: bool = False, most: int | None = None, line: bool = False
    ) -> str:
        """Free text before `rest`, of at most `most` characters without `<`; `line` keeps it on one line."""

    def token(self, text: str) -> int | None:
        """The id of a tag that is one token."""
        return self.tokenizer.special(text) if StringLiteral(text).is_tag else None

    def terminal(self, name: str) -> str:
        terminal = self.grammar.terminals.get(name)
        if terminal is None:
            raise GrammarError(f"{self.grammar.name}: terminal {name} is used but not defined")
        return (
            self.literal(terminal.text)
            if isinstance(terminal, StringLiteral)
            else self.pattern(name, terminal)
        )

    @property
    def tag_names(self) -> list[str]:
        """What tags begin with, without brackets: a text that holds one behind `<` or `</` passes for a tag.

        Reading takes `</outline>` or `<Outline 1>` for text; a model that writes one means the tag, and is
        lost without it.
        """
        return list(dict.fromkeys(mark.strip("</>") for mark in self.grammar.tag_literals))

    def chain(self, rule: str, low: int) -> str:
        low, high, shape = max(low, self.shape.min_width), self.shape.width, self.shape
        if low > high:
            raise GrammarError(f"{self.grammar.name}: {low} to {high} {rule}s cannot be written")
        flats = _flatten(self.grammar, SymbolRef(rule))
        for k in range(1, high + 1):
            number = f"{shape.prefix}{shape.first_number + k - 1}"
            self.lines[f"{rule}_{k}"] = " | ".join(self.sequence(f, number, outline=True) for f in flats)
            if k > low:
                tail = f" {rule}_from_{k + 1}?" if k < high else ""
                self.lines[f"{rule}_from_{k}"] = f"{rule}_{k}{tail}"
        head = " ".join(f"{rule}_{k}" for k in range(1, low + 1))
        return head + (f" {rule}_from_{low + 1}?" if high > low else "")
