"""Token chunks to text as it is written; what the text means is read elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sgl_apr.runtime.steps import Step
from sgl_apr.tokenizer import Tokenizer


class TextStream:
    """Token chunks to text deltas; holds back an unfinished character and the end-of-text token."""

    def __init__(self, tokenizer: Tokenizer, context: tuple[int, ...], emit: Callable[[str], None]) -> None:
        self.tokenizer, self.context, self.emit = tokenizer, context, emit
        self.pending: list[int] = []
        self.sent = 0

    def __call__(self, ids: Sequence[int]) -> None:
        self.pending += [i for i in ids if i not in self.tokenizer.eos_ids]
        text = self.tokenizer.decode(self.pending, self.context)
        if text and not text.endswith("\ufffd"):
            self.context = (*self.context[-4:], *self.pending)
            self.pending = []
            self.sent += len(text)
            self.emit(text)

    def finish(self, step: Step) -> None:
        """Emit what the chunks did not bring: a held-back end, and what was injected."""
        rest = "".join(piece.text for piece in step.pieces)[self.sent :]
        if rest:
            self.emit(rest)
