"""Keeps the token ids of a program's text: decoded ids are kept as they are, and only added text is encoded."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.join_layout import Layout, extend_layout, token_count

# Native forks copy the variables of a program and nothing else of the backend, so the ids are one of the variables.
TOKENS_VARIABLE = "__apr_ledger__"


@dataclass(frozen=True, slots=True)
class ProgramTokens:
    """A program's text so far, and its ids.

    Attributes:
        text: The text.
        ids: The token ids of the text.
        layout: How the beginning of the ids is joined in the KV cache, up to the end of the last join.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    layout: Layout = ()

    @property
    def joined_layout(self) -> Layout | None:
        """The layout of all ids, None if nothing is joined in the cache, or nothing follows the last join."""
        return extend_layout(self.layout, len(self.ids)) if len(self.ids) > token_count(self.layout) else None

    def extended_to(self, text: str, tokenizer: Tokenizer) -> ProgramTokens:
        """Return the tokens of a longer text. Text that was changed rather than extended is encoded as a whole."""
        if not text.startswith(self.text):
            return ProgramTokens().extended_to(text, tokenizer)
        rest = text[len(self.text) :]
        return (
            replace(
                self, text=text, ids=(*self.ids, *tokenizer.encode(rest, add_special_tokens=not self.ids))
            )
            if rest
            else self
        )

    def with_decoded(self, text: str, ids: Sequence[int], tokenizer: Tokenizer) -> ProgramTokens:
        """Return the tokens after decoded output was appended.

        The text can lack a final end-of-text token, a stop string, or special tokens. The ids are kept while their
        text is the program's, and the rest of the text is encoded.

        Args:
            text: What the program keeps of the output.
            ids: The decoded ids.
            tokenizer: The tokenizer.
        """
        kept = [i for i in ids[-1:] if i not in tokenizer.eos_ids]
        kept = [*ids[:-1], *kept]
        while kept and not text.startswith(tokenizer.decode(kept, self.ids)):
            kept.pop()
        text_kept = self.text + tokenizer.decode(kept, self.ids)
        extended = replace(self, text=text_kept, ids=(*self.ids, *kept))
        return extended.extended_to(self.text + text, tokenizer)


def stored_tokens(variables: Mapping[str, Any]) -> ProgramTokens:
    """Return the tokens that are stored with the variables of a program, which its text may have outgrown."""
    stored = variables.get(TOKENS_VARIABLE)
    return stored if isinstance(stored, ProgramTokens) else ProgramTokens()


def program_tokens(text: str, variables: MutableMapping[str, Any], tokenizer: Tokenizer) -> ProgramTokens:
    """Return the tokens of a program, updated to its text, and store them with its variables.

    Args:
        text: The program's text.
        variables: The program's variables.
        tokenizer: The tokenizer.
    """
    tokens = stored_tokens(variables).extended_to(text, tokenizer)
    variables[TOKENS_VARIABLE] = tokens
    return tokens
