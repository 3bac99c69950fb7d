"""Lowers a phase of a grammar to the text that a grammar backend compiles into a token mask."""

from __future__ import annotations

from sgl_apr.errors import GrammarError
from sgl_apr.formats.grammar import Grammar
from sgl_apr.formats.masks.llguidance import LlguidanceWriter
from sgl_apr.formats.masks.writer import GrammarBackend, GrammarWriter, MaskOptions, alternatives
from sgl_apr.formats.masks.xgrammar import XgrammarWriter
from sgl_apr.tokenizer import Tokenizer

WRITERS: dict[str, type[GrammarWriter]] = {"llguidance": LlguidanceWriter, "xgrammar": XgrammarWriter}
_DEFAULT_OPTIONS = MaskOptions()


def lower(
    grammar: Grammar,
    phase: str,
    tokenizer: Tokenizer,
    options: MaskOptions = _DEFAULT_OPTIONS,
    backend: GrammarBackend = "llguidance",
) -> str:
    """Return the text of a phase for a grammar backend, which a request sends as `ebnf`.

    A tag that is one added token is written as that token. Any other tag is spelled out, which xgrammar does not
    support. In both cases free text cannot contain a tag or anything that resembles one, but it can contain
    `x < y` or `<b>`.

    Args:
        grammar: The grammar.
        phase: The rule of the phase.
        tokenizer: The tokenizer of the model.
        options: What the request can decode.
        backend: The grammar backend of the server.

    Raises:
        GrammarError: The phase cannot be lowered.
    """
    if backend not in WRITERS:
        raise GrammarError(f"no grammar backend {backend!r}, expected {' or '.join(WRITERS)}")
    return WRITERS[backend](grammar, tokenizer, options).write(alternatives(grammar, phase, options))
