"""Lowers a phase of a grammar to the text that a grammar backend compiles into a token mask."""

from __future__ import annotations

from functools import lru_cache

from sgl_apr.errors import GrammarError
from sgl_apr.formats.grammar import TEXT, Grammar
from sgl_apr.formats.masks.free_text import ANY_TEXT
from sgl_apr.formats.masks.llguidance import LlguidanceWriter
from sgl_apr.formats.masks.tool_calls import extend_alternatives
from sgl_apr.formats.masks.writer import CallMode, GrammarBackend, GrammarWriter, MaskOptions, alternatives
from sgl_apr.formats.masks.xgrammar import XgrammarWriter
from sgl_apr.formats.tool_syntax import ToolSyntax
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
    writer = WRITERS[backend](grammar, tokenizer, options)
    return writer.write(extend_alternatives(alternatives(grammar, phase, options), writer))


@lru_cache(maxsize=256)  # called for every request
def lower_free_text(
    tokenizer: Tokenizer,
    backend: GrammarBackend = "llguidance",
    *,
    tool_syntax: ToolSyntax | None = None,
    max_calls: int = 0,
    call: CallMode = "auto",
    answer_schema: str | None = None,
    lead_chars: int | None = None,
) -> str:
    """Return the text of a grammar for text without a dialect, which can end with calls of tools.

    Args:
        tokenizer: The tokenizer of the model.
        backend: The grammar backend of the server.
        tool_syntax: The tools that can be called. The text cannot contain the text with which calls begin.
        max_calls: How many calls of tools the text can end with.
        call: Whether it can end with a call ("auto") or has to ("required").
        answer_schema: A JSON schema, as text. A text without calls is then JSON that fits it.
        lead_chars: The maximal length of the text before a call that is required, in characters.

    Raises:
        GrammarError: A schema holds something that the backend cannot enforce.
    """
    options = MaskOptions(
        tool_syntax=tool_syntax,
        max_calls=max_calls,
        call=call,
        answer_schema=answer_schema,
        lead_chars=lead_chars,
    )
    return lower(_free_text_grammar(), "text", tokenizer, options, backend)


@lru_cache(maxsize=1)
def _free_text_grammar() -> Grammar:
    return Grammar(f"text : {TEXT}\n{TEXT} : /{ANY_TEXT}/\n", "free text")


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
