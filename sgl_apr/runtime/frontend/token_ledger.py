"""The token ids behind a program's text: what was decoded is kept id for id, only added text is encoded."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.tokenizer import Tokenizer

# Native forks copy a program's variables and nothing else of a backend's, so the ledger is one of them.
TOKENS_VARIABLE = "__apr_ledger__"


@dataclass(frozen=True, slots=True)
class ProgramTokens:
    """A program's text so far, and its ids."""

    text: str = ""
    ids: tuple[int, ...] = ()

    def extended_to(self, text: str, tokenizer: Tokenizer) -> ProgramTokens:
        """The ledger of `text`. Where text was rewritten rather than added to, it starts anew."""
        if not text.startswith(self.text):
            return ProgramTokens().extended_to(text, tokenizer)
        rest = text[len(self.text) :]
        return (
            ProgramTokens(text, (*self.ids, *tokenizer.encode(rest, add_special_tokens=not self.ids)))
            if rest
            else self
        )

    def with_decoded(self, text: str, ids: Sequence[int], tokenizer: Tokenizer) -> ProgramTokens:
        """With `ids` decoded behind it, of which the program keeps `text`.

        They differ by a final end-of-text token, by a stop string that was cut off, and by special tokens
        that were left out: ids are kept as far as their text is the program's, and the rest is encoded.
        """
        kept = [i for i in ids[-1:] if i not in tokenizer.eos_ids]
        kept = [*ids[:-1], *kept]
        while kept and not text.startswith(tokenizer.decode(kept, self.ids)):
            kept.pop()
        known = ProgramTokens(self.text + tokenizer.decode(kept, self.ids), (*self.ids, *kept))
        return known.extended_to(self.text + text, tokenizer)


def program_tokens(text: str, variables: MutableMapping[str, Any], tokenizer: Tokenizer) -> ProgramTokens:
    """The ledger of a program, brought up to its text and stored with its variables."""
    known = variables.get(TOKENS_VARIABLE)
    ledger = (known if isinstance(known, ProgramTokens) else ProgramTokens()).extended_to(text, tokenizer)
    variables[TOKENS_VARIABLE] = ledger
    return ledger
