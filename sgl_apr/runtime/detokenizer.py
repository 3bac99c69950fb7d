"""Token chunks to text as it is written; what the text means is read elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sgl_apr.runtime.phase_output import PhaseOutput
from sgl_apr.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Hears the token chunks of one request and emits text, if anybody listens; holds back an unfinished
    character and the end-of-text token. `heard` are the ids so far, `sent` the characters emitted."""

    def __init__(
        self, tokenizer: Tokenizer, context: tuple[int, ...], emit: Callable[[str], None] | None
    ) -> None:
        self.tokenizer, self.emit, self._ends = tokenizer, emit, tokenizer.eos_ids
        self._before, self.context = context, context
        self.received_ids: list[int] = []
        self.pending: list[int] = []
        self.emitted_chars = 0

    def reset(self) -> int:
        """Forget all of it: the request begins anew. Returns how many characters had been emitted."""
        sent = self.emitted_chars
        self.context, self.received_ids, self.pending, self.emitted_chars = self._before, [], [], 0
        return sent

    def __call__(self, ids: Sequence[int]) -> None:
        self.received_ids += ids
        if self.emit is None:  # decoding text takes longer than all the rest
            return
        self.pending += [i for i in ids if i not in self._ends]
        text = self.tokenizer.decode(self.pending, self.context)
        if text and not text.endswith("\ufffd"):
            self.context = (*self.context[-4:], *self.pending)
            self.pending = []
            self.emitted_chars += len(text)
            self.emit(text)

    def finish(self, step: PhaseOutput) -> None:
        """Emit what the chunks did not bring: a held-back end, and what was injected."""
        rest = "".join(piece.text for piece in step.pieces)[self.emitted_chars :]
        if rest and self.emit:
            self.emit(rest)
