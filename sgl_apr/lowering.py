"""A grammar rule lowered to llguidance, which turns it into a token mask; reading finished text is Lark's job."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import product
from typing import Literal as OneOf

from sgl_apr.errors import GrammarError
from sgl_apr.grammar import NUMBER, TEXT, Alt, Expr, Grammar, Literal, Name, Repeat, Seq
from sgl_apr.tokenizer import Tokenizer

Fork = OneOf["auto", "required", "forbidden"]


@dataclass(frozen=True, slots=True)
class Chain:
    """A numbered rule, `low` times or more: written out as item 1, item 2, ... so that counting cannot fail."""

    rule: str
    low: int


@dataclass(frozen=True, slots=True)
class ForkMark:
    """In a flat sequence: here the fork rule begins."""


@dataclass(frozen=True, slots=True)
class MaybeText:
    """Optional free text, kept as one item: as two alternatives a lexer could not tell them apart in time."""


Item = Literal | Name | Chain | ForkMark | MaybeText
Flat = tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """What one request may decode of its phase.

    A fork gets `min_width` to `width` branches, numbered without gaps; `fork` allows the phase to
    fork, makes it, or forbids it. `lead_chars` bounds each text before a fork, and `outline_chars`
    makes each outline one short line. With `plain`, and in text that is bounded, there is no `<`,
    which keeps a small model from losing itself in tags of its own.
    """

    min_width: int = 2
    width: int = 8
    fork: Fork = "auto"
    lead_chars: int | None = None
    outline_chars: int | None = None
    plain: bool = False


def lower(grammar: Grammar, phase: str, tokenizer: Tokenizer, shape: Shape = Shape()) -> str:
    """llguidance's text for rule `phase`, to be sent as `ebnf` to a server that runs llguidance.

    A tag that is one added token is written as that token, any other is spelled out ("text mode").
    Either way free text holds no tag and nothing that passes for one, and `x < y` and `<b>` are as
    good as any text. Raises `GrammarError` if the phase cannot be lowered.
    """
    fork = shape.fork
    flats = list(dict.fromkeys(_flatten(grammar, Name(phase))))
    flats = [f for f in flats if fork == "auto" or (ForkMark() in f) == (fork == "required")]
    if not flats:
        raise GrammarError(f"{grammar.name}: phase {phase!r} with fork={fork!r} allows nothing")
    # Where the model may go on, it does: an alternative that neither forks nor ends in text says nothing.
    speaking = [f for f in flats if ForkMark() in f or f[-1:] == (Name(TEXT),)]
    return _Writer(grammar, tokenizer, shape).write(speaking or flats)


def _flatten(grammar: Grammar, expr: Expr) -> list[Flat]:
    """Every way through `expr` as a flat sequence; numbered repetitions stay folded as a `Chain`."""
    match expr:
        case Name(name) if name in grammar.rules or name.islower():
            mark: Flat = (ForkMark(),) if name == "fork" else ()
            return [mark + flat for flat in _flatten(grammar, grammar.rule(name))]
        case Seq(items):
            ways = product(*(_flatten(grammar, item) for item in items))
            return [sum(parts, ()) for parts in ways]
        case Alt(options):
            return [flat for option in options for flat in _flatten(grammar, option)]
        case Repeat(Name(name), many=False) if name == TEXT:
            return [(MaybeText(),)]
        case Repeat(item, low, many=False):
            return ([] if low else [()]) + _flatten(grammar, item)
        case Repeat(Name(name), low) if name in grammar.rules and _is_numbered(grammar, name):
            return [(Chain(name, low),)]
        case Repeat():
            raise GrammarError(f"{grammar.name}: a phase can repeat numbered rules only, not {expr.item}")
        case Literal() | Name():
            return [(expr,)]


def _is_numbered(grammar: Grammar, rule: str) -> bool:
    return all(Name(NUMBER) in flat for flat in _flatten(grammar, Name(rule)))


class _Writer:
    """Writes rules and terminals once each; the name of a rule is what makes it the same."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, shape: Shape) -> None:
        self.grammar, self.shape = grammar, shape
        self.ids = {tag: i for tag in grammar.tags if (i := tokenizer.special(tag)) is not None}
        self.lines: dict[str, str] = {}

    def write(self, flats: list[Flat]) -> str:
        body = " | ".join(self.sequence(flat) for flat in flats)
        return "\n".join([f"start: {body}", *(f"{name}: {rule}" for name, rule in self.lines.items())]) + "\n"

    def sequence(self, flat: Flat, number: int | None = None) -> str:
        items = [i for i in flat if not isinstance(i, ForkMark)]
        behind = len(items) - flat.index(ForkMark()) if ForkMark() in flat else len(items)
        words: list[str] = []
        while items:
            most = self.shape.lead_chars if len(items) > behind else None
            item = items.pop(0)
            match item:
                case MaybeText():
                    words.append(self.text(items, optional=True, most=most))
                case Name(name) if name == TEXT and number:
                    words.append(self.text(items, most=self.shape.outline_chars, line=True))
                case Name(name) if name == TEXT:
                    words.append(self.text(items, most=most))
                case Name(name) if name == NUMBER and number is not None:
                    words.append(json.dumps(str(number)))
                case Name(name):
                    words.append(self.terminal(name))
                case Literal(text):
                    words.append(self.fixed(text))
                case Chain(rule, low):
                    words.append(self.chain(rule, low))
        return " ".join(words) or '""'

    def fixed(self, text: str) -> str:
        return f"<[{self.ids[text]}]>" if text in self.ids else json.dumps(text)

    def terminal(self, name: str) -> str:
        terminal = self.grammar.terminals.get(name)
        if terminal is None:
            raise GrammarError(f"{self.grammar.name}: terminal {name} is used but not defined")
        if isinstance(terminal, Literal):
            return self.fixed(terminal.text)
        self.lines[name] = f"/{terminal}/"
        return name

    def text(
        self,
        rest: list[Literal | Name | Chain | MaybeText],
        *,
        optional: bool = False,
        most: int | None = None,
        line: bool = False,
    ) -> str:
        """Free text up to what follows; a tag that is spelled out is taken off `rest` and read with the text.

        A lexeme has no look-ahead, so text that ends at a spelled tag is one lexeme with it.
        """
        following = rest[0] if rest else None
        pattern = self.grammar.terminals[TEXT]
        if most or self.shape.plain:  # without `<` in it, text ends by itself where a tag begins
            name = f"{'LINE' if line else 'LEAD'}_{most}" if most else "PLAIN"
            character = "[^<\\n]" if most and line else "[^<]"
            self.lines[name] = f"/{pattern}/ & /{character}{f'{{1,{most}}}' if most else '+'}/"
            return name + "?" * optional
        if following is None or (isinstance(following, Literal) and following.text in self.ids):
            self.lines[TEXT] = f"/{pattern}/ & ~/(.|\\n)*{self.near_tag}(.|\\n)*/"
            return TEXT + "?" * optional
        if not (isinstance(following, Literal) and following.is_tag):
            raise GrammarError(
                f"{self.grammar.name}: {TEXT} must be followed by a tag or the end, not {following}"
            )
        rest.pop(0)
        name = f"{'MAYBE_' * optional}UNTIL_{self.grammar.tags.index(following.text)}"
        tag, body = _regex(following.text), f"({pattern}){'?' * optional}"
        self.lines[name] = f"/{body}{tag}/ & ~/(.|\\n)*{self.near_tag}(.|\\n)*{tag}/"
        return name

    @property
    def near_tag(self) -> str:
        """A tag or what would pass for one: its beginning in any case, as in `</outline>` or `<Outline 1>`.

        Reading takes those for text; a model that writes one means the tag, and is lost without it.
        """
        names = dict.fromkeys(re.sub(r"\W", "", tag) for tag in self.grammar.tags)
        return rf"<\/?(?i:{'|'.join(map(re.escape, names))})"

    def chain(self, rule: str, low: int) -> str:
        low, high = max(low, self.shape.min_width), self.shape.width
        if low > high:
            raise GrammarError(f"{self.grammar.name}: {low} to {high} {rule}s cannot be written")
        flats = _flatten(self.grammar, Name(rule))
        for k in range(1, high + 1):
            self.lines[f"{rule}_{k}"] = " | ".join(self.sequence(flat, k) for flat in flats)
            if k > low:
                tail = f" {rule}_from_{k + 1}?" if k < high else ""
                self.lines[f"{rule}_from_{k}"] = f"{rule}_{k}{tail}"
        head = " ".join(f"{rule}_{k}" for k in range(1, low + 1))
        return head + (f" {rule}_from_{low + 1}?" if high > low else "")


def _regex(text: str) -> str:
    return re.escape(text).replace("/", "\\/")
