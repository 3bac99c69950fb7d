"""Lower a grammar rule to the text that a grammar backend compiles into a token mask."""

from __future__ import annotations

from sgl_apr.errors import GrammarError
from sgl_apr.formats.grammar import Grammar
from sgl_apr.formats.masks.llguidance import LlguidanceWriter
from sgl_apr.formats.masks.writer import Backend, GrammarWriter, MaskOptions, alternatives
from sgl_apr.formats.masks.xgrammar import XgrammarWriter
from sgl_apr.tokenizer import Tokenizer

WRITERS: dict[str, type[GrammarWriter]] = {"llguidance": LlguidanceWriter, "xgrammar": XgrammarWriter}
_DEFAULT = MaskOptions()


def lower(
    grammar: Grammar,
    phase: str,
    tokenizer: Tokenizer,
    shape: MaskOptions = _DEFAULT,
    backend: Backend = "llguidance",
) -> str:
    """The text of rule `phase` for a grammar backend, to be sent as `ebnf` to a server that runs it.

    A tag that is one added token is written as that token, any other is spelled out ("text mode", which
    xgrammar cannot do). Either way free text holds no tag and nothing that passes for one, and `x < y`
    and `<b>` are as good as any text. Raises `GrammarError` if the phase cannot be lowered.
    """
    if backend not in WRITERS:
        raise GrammarError(f"no lowering to {backend!r}, expected {' or '.join(WRITERS)}")
    return WRITERS[backend](grammar, tokenizer, shape).write(alternatives(grammar, phase, shape))
