"""Checks once, before anything is decoded, that a grammar backend can enforce the schemas of tools and answers."""

from __future__ import annotations

from functools import lru_cache

from sgl_apr.errors import GrammarError
from sgl_apr.formats.masks.lower import lower_free_text
from sgl_apr.formats.masks.mask_options import GrammarBackend
from sgl_apr.formats.masks.xgrammar_json import first_line
from sgl_apr.formats.tool_syntax import ToolSyntax
from sgl_apr.tokenizer import Tokenizer


def check_tools(syntax: ToolSyntax, tokenizer: Tokenizer, backend: GrammarBackend) -> None:
    """Check that calls of every tool can be constrained, by compiling the grammar of each.

    Args:
        syntax: The tools.
        tokenizer: The tokenizer of the model.
        backend: The grammar backend of the server.

    Raises:
        AprError: A tool cannot be constrained. The message names the tool and what the backend cannot enforce.
    """
    for tool in syntax.tools:
        _check(ToolSyntax(syntax.parser, (tool,)), None, tokenizer, backend, f"tool {tool.name!r}")


def check_answer_schema(schema: str, tokenizer: Tokenizer, backend: GrammarBackend) -> None:
    """Check that an answer can be constrained to a schema.

    Args:
        schema: The schema, as JSON text.
        tokenizer: The tokenizer of the model.
        backend: The grammar backend of the server.

    Raises:
        AprError: It cannot. The message names what the backend cannot enforce.
    """
    _check(None, schema, tokenizer, backend, "the answer's schema")


@lru_cache(maxsize=512)
def _check(
    syntax: ToolSyntax | None, schema: str | None, tokenizer: Tokenizer, backend: GrammarBackend, where: str
) -> None:
    try:
        grammar = lower_free_text(
            tokenizer, backend, tool_syntax=syntax, max_calls=1 if syntax else 0, answer_schema=schema
        )
    except GrammarError as error:
        raise GrammarError(str(error) if where in str(error) else f"{where}: {error}") from None
    if problem := _compile_error(grammar, backend):
        raise GrammarError(f"{where}: the grammar backend {backend} cannot enforce its schema: {problem}")


def _compile_error(grammar: str, backend: GrammarBackend) -> str:
    """What a backend says against a grammar; empty if it compiles, or if the backend is not installed here."""
    try:
        if backend == "llguidance":
            from llguidance import LLMatcher

            # Tokens are not known here, and a rule that names one is as good as any other.
            message = str(LLMatcher.validate_grammar(grammar))
            return message.partition("failed to compile JSON schema: ")[2].split("\n")[0] or message[:200]
        from xgrammar import Grammar

        Grammar.from_ebnf(grammar)
    except ImportError:
        return ""
    except RuntimeError as error:
        return first_line(error)
    return ""
