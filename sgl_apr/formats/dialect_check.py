"""Checks of a dialect beyond its syntax: rules that nothing uses, masks of its phases, and an example document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import get_args

from sgl_apr.errors import ConversionError, GrammarError, TraceError
from sgl_apr.formats.conversion import BlockDraft, render_blocks
from sgl_apr.formats.dialects import Dialect
from sgl_apr.formats.grammar_checks import unused_definitions
from sgl_apr.formats.masks.writer import GrammarBackend
from sgl_apr.formats.options import Phase
from sgl_apr.tokenizer import Tokenizer

# Rules with a meaning for the runtime that a document holds. In a dialect that joins by messages, `header` and `closer`
# are only in what a branch reads and decodes.
DOCUMENT_RULES = (
    "fork",
    "outline",
    "lead",
    "header",
    "closer",
    "tail",
    "close",
    "conclusion",
    "wait",
    "result",
    "failure",
)
MESSAGE_RULES = ("header", "closer")
OUTLINES = ("A plan.", "plan", "0", "x")  # the first that the dialect allows is used


@dataclass(frozen=True, slots=True)
class DialectReport:
    """What a check of a dialect found.

    Attributes:
        dialect: The dialect.
        errors: What will not work, each with its line if it has one.
        warnings: What has no effect.
        example: A document of the dialect, empty if none could be written.
        backends: The grammar backends that can decode every phase: with tags as tokens, or "llguidance, spelled" for
            tags that are not tokens.
    """

    dialect: Dialect
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    example: str
    backends: tuple[str, ...]


def check_dialect(dialect: Dialect) -> DialectReport:
    """Check a dialect, which was read without an error.

    Examples:
        >>> from sgl_apr.formats.dialects import dialect
        >>> report = check_dialect(dialect("npr"))
        >>> report.errors, report.backends
        ((), ('llguidance', 'xgrammar', 'llguidance, spelled'))
    """
    errors, warnings = _unused(dialect)
    backends: list[str] = []
    for label, (backend, tokenizer) in _BACKENDS.items():
        problems = list(_mask_errors(dialect, tokenizer, backend))
        if not problems:
            backends.append(label)
        elif label == "llguidance":
            errors += problems
    try:
        example = example_document(dialect)
    except GrammarError as error:
        example = ""
        errors.append(str(error))
    return DialectReport(dialect, tuple(errors), tuple(warnings), example, tuple(backends))


def _unused(dialect: Dialect) -> tuple[list[str], list[str]]:
    """Errors for rules and warnings for terminals that nothing uses."""
    grammar, name = dialect.grammar, f"{dialect.name}.lark"
    own_context = MESSAGE_RULES if dialect.branch_context == "message" else ()
    roots = frozenset({"trace", "body", *get_args(Phase), *(r for r in own_context if r == "header")})
    errors, warnings = [], []
    unused = unused_definitions(grammar.rules, grammar.terminals, roots)
    outside = unused_definitions(grammar.rules, {}, frozenset({"trace"}))
    for key in unused:
        place = f"{name}, line {grammar.lines[key]}"
        if key in grammar.rules:
            errors.append(f"{place}: rule {key!r} is not used: no reply and no phase holds it")
        else:
            warnings.append(f"{place}: terminal {key} is not used")
    for key in DOCUMENT_RULES:
        if key in outside and key not in unused and key not in own_context:
            errors.append(
                f"{name}, line {grammar.lines[key]}: rule {key!r} is not part of 'trace', so no reply can hold it"
            )
    return errors, warnings


class ByteVocabulary:
    """A tokenizer whose tokens are bytes, and tags if `has_tags`. It stands for tokenizers with and without the tags."""

    eos_ids = frozenset({256})

    def __init__(self, *, has_tags: bool) -> None:
        self._has_tags = has_tags

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def special_token_id(self, tag: str) -> int | None:
        return 257 if self._has_tags else None

    @property
    def added_tokens(self) -> Mapping[str, int]:
        return {}


_BACKENDS: dict[str, tuple[GrammarBackend, Tokenizer]] = {
    "llguidance": ("llguidance", ByteVocabulary(has_tags=True)),
    "xgrammar": ("xgrammar", ByteVocabulary(has_tags=True)),
    "llguidance, spelled": ("llguidance", ByteVocabulary(has_tags=False)),
}


def _mask_errors(dialect: Dialect, tokenizer: Tokenizer, backend: GrammarBackend) -> Iterator[str]:
    first = str(dialect.first_number)
    waiting = (first,) if dialect.asynchronous else ()
    for phase in get_args(Phase):
        rule = dialect.rule_for_phase(phase)
        if rule not in dialect.grammar.rules:
            continue
        try:
            dialect.lower(phase, tokenizer, backend, number=first, waiting=waiting)
            dialect.stop_strings(phase)
        except GrammarError as error:
            yield f"{dialect.name}.lark, line {dialect.grammar.lines[rule]}: phase {phase!r}: {error}"


def example_document(dialect: Dialect) -> str:
    """Return a small document of a dialect, with the texts that the runtime writes.

    Raises:
        GrammarError: What the runtime writes for a block does not match the rule `trace`.
    """
    reason: Exception | None = None
    for outline, before, after, conclusion in product(
        OUTLINES, ("Text.\n", ""), ("\nMore.", "More.", ""), ("Both.", "")
    ):
        numbers = range(
            dialect.first_number, dialect.first_number + max(dialect.min_width, min(2, dialect.width))
        )
        try:
            if dialect.asynchronous:
                block: str | BlockDraft = _asynchronous_block(dialect, outline, [str(n) for n in numbers])
            else:
                block = BlockDraft(
                    outlines=[outline if "outline" in dialect.grammar.rules else ""] * len(numbers),
                    branches=[["One."] for _ in numbers],
                    results=["One."] * len(numbers),
                    conclusion=conclusion,
                )
            text = render_blocks([item for item in (before, block, after) if item], dialect)
            if dialect.parse(text).blocks:
                return text
        except (TraceError, ConversionError, GrammarError) as error:
            reason = reason or error
    raise GrammarError(
        f"{dialect.name}.lark, line {dialect.grammar.lines['trace']}: a block as the runtime writes it does not match rule "
        f"'trace': {reason}"
    )


def _asynchronous_block(dialect: Dialect, outline: str, numbers: list[str]) -> str:
    """Forks, and then the waits for them with what they returned."""
    grammar = dialect.grammar
    forks = "".join(grammar.render_rule("fork", n, outline, outline) for n in numbers)
    if dialect.branch_context == "message":
        waits = (
            grammar.render_rule("wait", n) + grammar.render_rule("result", n, "One.", outline)
            for n in numbers
        )
        return forks + "".join(waits)
    branches = (
        grammar.render_rule("header", n) + "One." + grammar.closing_literal("body", n) for n in numbers
    )
    return forks + grammar.render_rule("wait") + "".join(branches)
