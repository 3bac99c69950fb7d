"""Turns token chunks of one request into text as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sgl_apr.runtime.phase_output import PhaseOutput
from sgl_apr.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Emits text for the token chunks of one request. Call it with each chunk.

    It holds back an unfinished character and the end-of-text token.

    Args:
        tokenizer: Decodes.
        context: The token ids before the first chunk.
        emit: Receives the text. Without it no text is decoded.

    Attributes:
        received_ids: The ids so far.
        emitted_chars: The characters emitted so far.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: tuple[int, ...], emit: Callable[[str], None] | None
    ) -> None:
        self.tokenizer, self.emit, self._ends = tokenizer, emit, tokenizer.eos_ids
        self.context = context
        self.received_ids: list[int] = []
        self.pending: list[int] = []
        self.emitted_chars = 0
        self._kept: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int] = context, (), (), 0

    def keep(self) -> None:
        """Keep what was received: a request that continues after it begins here when it is repeated."""
        self._kept = self.context, tuple(self.received_ids), tuple(self.pending), self.emitted_chars

    def discard(self) -> int:
        """Start over from the first request. Returns how many characters that were emitted are void."""
        emitted, self.emitted_chars = self.emitted_chars, 0
        self.received_ids, self.pending = [], []
        return emitted

    def reset(self) -> int:
        """Start over for a repeated request. Returns how many characters that it had emitted are void."""
        emitted = self.emitted_chars
        self.context, received, pending, self.emitted_chars = self._kept
        self.received_ids, self.pending = list(received), list(pending)
        return emitted - self.emitted_chars

    def __call__(self, ids: Sequence[int]) -> None:
        self.received_ids += ids
        if self.emit is None:  # decoding would take longer than all else here
            return
        self.pending += [i for i in ids if i not in self._ends]
        text = self.tokenizer.decode(self.pending, self.context)
        if text and not text.endswith("\ufffd"):
            self.context = (*self.context[-4:], *self.pending)
            self.pending = []
            self.emitted_chars += len(text)
            self.emit(text)

    def finish(self, output: PhaseOutput) -> None:
        """Emit the rest: what was held back, and what was injected."""
        if self.emit and (rest := "".join(piece.text for piece in output.pieces)[self.emitted_chars :]):
            self.emit(rest)
