"""Phases that continue after the result of a tool, in their free text."""

from __future__ import annotations

import re
from functools import lru_cache

from sgl_apr.formats.completion import PLACEHOLDER
from sgl_apr.formats.grammar import TEXT, Grammar
from sgl_apr.formats.lark_ast import StringLiteral, SymbolRef
from sgl_apr.formats.masks.writer import OWN, FlatSequence, OptionalText, RuleMarker, flatten_rule
from sgl_apr.formats.segmenter import Segment


@lru_cache(maxsize=256)
def resumption_prefixes(grammar: Grammar, rule: str) -> tuple[str, ...]:
    """Return texts after which a phase is in its free text, the shortest first.

    A phase that continues after the result of a tool is parsed with such a text before it.

    Args:
        grammar: The grammar.
        rule: The rule of the phase.
    """
    prefixes = {
        _render(grammar, flat[:index])
        for flat in flatten_rule(grammar, rule)
        for index, item in enumerate(flat)
        if item == OWN
    }
    return tuple(sorted((p for p in prefixes if p is not None), key=len))


def drop_prefix(segments: list[Segment], size: int) -> list[Segment]:
    """Return segments without a prefix of the text that they are of."""
    if not size:
        return segments
    return [
        s._replace(
            start=max(s.start - size, 0),
            end=s.end - size,
            outlines=tuple(o._replace(offset=o.offset - size) for o in s.outlines),
        )
        for s in segments
        if s.end > size
    ]


def _render(grammar: Grammar, flat: FlatSequence) -> str | None:
    """A text of a flat sequence; None if it holds something that has no fixed text."""
    text = ""
    for item in flat:
        match item:
            case RuleMarker() | OptionalText():
                continue
            case StringLiteral(value):
                text += value
            case SymbolRef(name) if name == TEXT:
                text += PLACEHOLDER
            case SymbolRef(name):
                terminal = grammar.terminals.get(name)
                fillers = ("0", "1", PLACEHOLDER, "x")
                value = (
                    terminal.text
                    if isinstance(terminal, StringLiteral)
                    else next((f for f in fillers if re.fullmatch(terminal or "", f)), "")
                )
                if not value:
                    return None
                text += value
            case _:
                return None
    return text
