"""Flattens a phase of a grammar into sequences, and writes them as rules for a grammar backend.

The backend compiles the rules into a token mask. Each backend has a subclass of `GrammarWriter`.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from sgl_apr.errors import GrammarError
from sgl_apr.formats.call_formats import call_tag_names
from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar, merge_tag_parts
from sgl_apr.formats.grammar_checks import check_expansion
from sgl_apr.formats.lark_ast import Alt, Expr, Repeat, SequenceExpr, StringLiteral, SymbolRef
from sgl_apr.formats.masks.free_text import text_excluding, text_parts
from sgl_apr.formats.masks.mask_options import CallMode as CallMode
from sgl_apr.formats.masks.mask_options import ForkMode as ForkMode
from sgl_apr.formats.masks.mask_options import GrammarBackend as GrammarBackend
from sgl_apr.formats.masks.mask_options import MaskOptions as MaskOptions
from sgl_apr.formats.masks.mask_options import TextLimits as TextLimits
from sgl_apr.formats.segmenter import SEGMENT_RULES
from sgl_apr.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class NumberedRepeat:
    """A repetition of a numbered rule. It is written out as item 1, item 2, ..., so that the count cannot be wrong."""

    rule: str
    min_count: int


@dataclass(frozen=True, slots=True)
class RuleMarker:
    """Marks where the rule `fork` or `wait` begins in a flat sequence, or (`OWN`) free text of the sequence itself."""

    rule: str


@dataclass(frozen=True, slots=True)
class OptionalText:
    """Optional free text. It stays one item, because a lexer could not tell two alternatives apart in time."""


@dataclass(frozen=True, slots=True)
class RuleRef:
    """A reference to a rule that is already written. The rule begins with one token, or follows something other
    than text."""

    name: str


_TOKEN_LIKE = re.compile(r"(<[^<>\s]+>|\[[A-Z_]+\])")  # what can be one token in the form of a call

Item = StringLiteral | SymbolRef | NumberedRepeat | RuleMarker | OptionalText | RuleRef
FlatSequence = tuple[Item, ...]
FORK, WAIT = RuleMarker("fork"), RuleMarker("wait")
OWN = RuleMarker("own")
CALLS = "tool_calls"  # the rule of calls of tools


def alternatives(grammar: Grammar, phase: str, options: MaskOptions) -> list[FlatSequence]:
    """Return every alternative of a phase that the options allow, as flat sequences.

    Raises:
        GrammarError: The options allow nothing.
    """
    check_expansion(grammar.rules, phase, grammar.name)
    flats = flatten_rule(grammar, phase)
    if options.resumed:
        flats = list(dict.fromkeys(flat[i:] for flat in flats for i, item in enumerate(flat) if item == OWN))
    if options.fork != "auto":
        flats = [f for f in flats if (FORK in f) == (options.fork == "required")]
    flats = [f for f in flats if WAIT not in f or options.waiting]
    if any(WAIT in f for f in flats):
        flats = [f for f in flats if FORK in f or WAIT in f]
    if not flats:
        raise GrammarError(f"{grammar.name}: phase {phase!r} with fork={options.fork!r} allows nothing")
    # If the model can continue, it has to: an alternative that neither forks nor ends in text has no content.
    with_content = [f for f in flats if FORK in f or f[-1:] == (SymbolRef(TEXT),)]
    return with_content if any(f[-1:] == (SymbolRef(TEXT),) for f in flats) else flats


def flatten_rule(grammar: Grammar, rule: str) -> list[FlatSequence]:
    """Return every alternative of a rule as a flat sequence. Free text of the sequence itself follows `OWN`."""
    return list(dict.fromkeys(_flatten(grammar, SymbolRef(rule))))


def _flatten(grammar: Grammar, expr: Expr, own: FlatSequence = (OWN,)) -> list[FlatSequence]:
    """Every alternative of an expression as a flat sequence. Numbered repetitions stay folded."""
    match expr:
        case SymbolRef(name) if name in grammar.rules or name.islower():
            marker: FlatSequence = (RuleMarker(name),) if name in ("fork", "wait") else ()
            inside = () if name in SEGMENT_RULES else own
            return [marker + flat for flat in _flatten(grammar, grammar.rule(name), inside)]
        case SequenceExpr(items):
            return [sum(parts, ()) for parts in product(*(_flatten(grammar, item, own) for item in items))]
        case Alt(options):
            return [flat for option in options for flat in _flatten(grammar, option, own)]
        case Repeat(SymbolRef(name), unbounded=False) if name == TEXT:
            return [(*own, OptionalText())]
        case Repeat(item, min_count, unbounded=False):
            return ([] if min_count else [()]) + _flatten(grammar, item, own)
        case SymbolRef(name) if name == TEXT:
            return [(*own, expr)]
        case Repeat(SymbolRef(name), min_count) if name in grammar.rules and _is_numbered(grammar, name):
            return [(NumberedRepeat(name, min_count),)]
        case Repeat():
            raise GrammarError(
                f"{grammar.name}: a phase repeats {expr.item}, expected a rule in which every alternative "
                f"has a {NUMBER}"
            )
        case StringLiteral() | SymbolRef():
            return [(expr,)]


def _is_numbered(grammar: Grammar, rule: str) -> bool:
    return all(SymbolRef(NUMBER) in flat for flat in _flatten(grammar, SymbolRef(rule)))


class GrammarWriter(ABC):
    """Writes flat sequences as rules. Rules of the same name are the same rule, and written once.

    Args:
        grammar: The grammar.
        tokenizer: The tokenizer of the model.
        options: What the request can decode.
    """

    BACKEND: GrammarBackend
    DEFINES = ": "
    START = "start"

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, options: MaskOptions) -> None:
        self.grammar, self.options, self.tokenizer = grammar, options, tokenizer
        self.lines: dict[str, str] = {}  # the body of each rule, by its name

    def write(self, flats: list[FlatSequence]) -> str:
        """Return the text of a grammar whose start rule has these alternatives."""
        options = self.options
        bodies: list[str] = []
        for flat in flats:
            for number in options.waiting if WAIT in flat else (options.number,):
                bodies.append(self.sequence(flat, number))
        body = " | ".join(dict.fromkeys(bodies))
        lines = [f"{name}{self.DEFINES}{rule}" for name, rule in {self.START: body, **self.lines}.items()]
        return "\n".join(lines) + "\n"

    def sequence(self, flat: FlatSequence, number: str, *, outline: bool = False) -> str:
        """Return the body of a rule for a flat sequence.

        Args:
            flat: The sequence.
            number: Replaces NUMBER.
            outline: Whether the sequence is an outline.
        """
        items = list(flat)
        before_fork = FORK in items
        # A model that has to call a tool could write until its tokens are used up.
        before_call = self.options.call == "required" and RuleRef(CALLS) in items
        symbols: list[str] = []
        items = merge_tag_parts(items, number) if number else items
        while items:
            max_chars = self.options.lead_chars if before_fork or before_call else None
            item = items.pop(0)
            match item:
                case RuleMarker(rule):
                    before_fork, outline = before_fork and rule != "fork", outline or rule == "fork"
                case OptionalText():
                    symbols.append(self.text(items, optional=True, max_chars=max_chars))
                case SymbolRef(name) if name == TEXT and outline:
                    symbols.append(self.text(items, max_chars=self.options.outline_chars, single_line=True))
                case SymbolRef(name) if name == TEXT:
                    symbols.append(self.text(items, max_chars=max_chars))
                case SymbolRef(name):
                    symbols.append(self.terminal(name))
                case StringLiteral(text):
                    symbols.append(self.literal(text))
                case NumberedRepeat(rule, min_count):
                    symbols.append(self.numbered_items(rule, min_count))
                case RuleRef(name):
                    symbols.append(name)
        return " ".join(symbols) or '""'

    @abstractmethod
    def literal(self, text: str) -> str:
        """Return the symbol of a fixed text, or the token of a tag that is one token."""

    @abstractmethod
    def pattern(self, name: str, regex: str) -> str:
        """Return the symbol of a terminal that is a regular expression."""

    @abstractmethod
    def text(
        self,
        rest: list[Item],
        *,
        optional: bool = False,
        max_chars: int | None = None,
        single_line: bool = False,
    ) -> str:
        """Return the symbol of free text.

        Args:
            rest: The items after the text. Items that are written together with it are removed from the list.
            optional: Whether the text can be empty.
            max_chars: The maximal length in characters. Such a text contains no `<`.
            single_line: Whether a text with a maximal length has to stay on one line.
        """

    @abstractmethod
    def json_value(self, name: str, schema: Mapping[str, Any]) -> str:
        """Write a rule for JSON that fits a schema, and return its symbol.

        Args:
            name: The name of the rule.
            schema: The schema, as `SchemaPreparer` returns it.
        """

    @property
    @abstractmethod
    def string_pattern(self) -> str | None:
        """The pattern that keeps tags out of a JSON string; None if `json_value` does."""

    @abstractmethod
    def parameter_text(self, name: str, end: str, limits: TextLimits) -> list[str]:
        """Return the symbols of a parameter that is plain text, and of the fixed text at its end.

        Args:
            name: Names its rules.
            end: The fixed text after it, which begins with a character that is no tag.
            limits: What the text has to be.
        """

    def token(self, text: str) -> int | None:
        """Return the id of a tag that is one token, otherwise None."""
        return self.tokenizer.special_token_id(text) if self.is_tag(text) else None

    def is_tag(self, text: str) -> bool:
        """Whether free text ends where a text stands: at a tag, and where calls of tools begin."""
        return StringLiteral(text).is_tag or text == self.trigger

    @cached_property
    def trigger(self) -> str | None:
        """The text with which calls of tools begin."""
        syntax = self.options.tool_syntax
        return None if syntax is None else syntax.trigger

    def fixed(self, text: str) -> list[str]:
        """Return the symbols of a fixed text in which some pieces are one token each."""
        symbols: list[str] = []
        plain = ""
        for piece in _TOKEN_LIKE.split(text):
            token = self.tokenizer.special_token_id(piece) if _TOKEN_LIKE.fullmatch(piece) else None
            if token is None:
                plain += piece
                continue
            symbols += [self.plain(plain)] if plain else []
            symbols.append(self.token_symbol(token))
            plain = ""
        return [*symbols, self.plain(plain)] if plain else symbols

    def plain(self, text: str) -> str:
        """Return the symbol of a fixed text of ordinary characters."""
        return json.dumps(text, ensure_ascii=False)

    def text_pattern(self, names: list[str]) -> str:
        """Return a regular expression for free text. Masks without tools and answers have the one they always had."""
        if self.options.tool_syntax is None and self.options.answer_schema is None:
            return text_excluding(names)
        parts = text_parts(names)
        return f"({parts.character}|{parts.leaving})+{parts.staying}"

    @abstractmethod
    def token_symbol(self, token: int) -> str:
        """Return the symbol of one token."""

    def terminal(self, name: str) -> str:
        """Return the symbol of a terminal."""
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
        """The names of the tags, without brackets. Free text cannot contain one after `<` or `</`.

        The parser reads `</outline>` or `<Outline 1>` as text. A model that writes one means the tag, and cannot
        continue without it.
        """
        return list(dict.fromkeys(tag.strip("</>") for tag in self.grammar.tag_literals))

    @cached_property
    def excluded_names(self) -> list[str]:
        """The names that no text can contain: `tag_names`, and with tools or a JSON answer those of control tokens.

        Control tokens of chat models begin with `<|`.
        """
        syntax = self.options.tool_syntax
        names = [] if syntax is None else [*call_tag_names(syntax.form), "|", "\uff5c"]
        if self.options.answer_schema is not None:
            names.append("|")
        return list(dict.fromkeys([*self.tag_names, *names]))

    def numbered_items(self, rule: str, min_count: int) -> str:
        """Return the symbols of a numbered repetition: a rule for each number, as many as the options allow."""
        options = self.options
        low, high = max(min_count, options.min_width), options.width
        if low > high:
            raise GrammarError(
                f"{self.grammar.name}: cannot write between {low} and {high} {rule}s, expected a width of {low} or more"
            )
        flats = _flatten(self.grammar, SymbolRef(rule))
        for k in range(1, high + 1):
            number = f"{options.prefix}{options.first_number + k - 1}"
            self.lines[f"{rule}_{k}"] = " | ".join(self.sequence(f, number, outline=True) for f in flats)
            if k > low:
                tail = f" {rule}_from_{k + 1}?" if k < high else ""
                self.lines[f"{rule}_from_{k}"] = f"{rule}_{k}{tail}"
        head = " ".join(f"{rule}_{k}" for k in range(1, low + 1))
        return head + (f" {rule}_from_{low + 1}?" if high > low else "")
