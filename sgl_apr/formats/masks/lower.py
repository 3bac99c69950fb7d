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


def check_widths(name: str, options: MaskOptions, max_width: int, max_depth: int) -> None:
    """Check that a dialect allows the widths and the depth of a mask.

    Args:
        name: The name of the dialect.
        options: What the request can decode.
        max_width: The highest number of branches of the dialect.
        max_depth: How deep its blocks can nest.

    Raises:
        GrammarError: It does not allow them.
    """
    if not 1 <= options.min_width <= options.width <= max_width:
        raise GrammarError(
            f"{name}: width {options.min_width} to {options.width}, expected within 1 to {max_width}"
        )
    if not 1 <= options.depth <= max_depth:
        raise GrammarError(f"{name}: depth {options.depth}, expected within 1 to {max_depth}")
