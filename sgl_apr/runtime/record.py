"""What one trajectory under way has come to: its spans, its calls, and its strands; it decides nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sgl_apr.engine.base import Result
from sgl_apr.runtime.steps import Step
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory import Call, Finish, Path, Role, Span, Trajectory

OnText = Callable[[Path, str], None]


@dataclass
class Strand:
    """One line of thought as it grows: the trunk, or a branch.

    `order` lists its spans as they stand in the text; `tip` are those that its next span follows. `left`
    is what it may still spend, `spent` what it and its branches have. `number` is as its header has it.
    """

    path: Path
    context: tuple[int, ...]
    tip: tuple[int, ...]
    left: int
    order: list[int] = field(default_factory=list)
    number: str = ""
    outline: str = ""
    after: tuple[int, ...] = ()
    blocks: int = 0
    spent: int = 0
    ahead: Ahead | None = None
    given_up: bool = False

    @property
    def depth(self) -> int:
        return len(self.path) // 2


@dataclass
class Ahead:
    """Branches of a strand that run while it goes on: `forked` are all of its open block, `running` those
    not joined, each with what was set aside for it."""

    forked: int = 0
    running: dict[str, tuple[Strand, asyncio.Task[None], int]] = field(default_factory=dict)


class Record:
    """Everything written so far, in the order in which it was written; `trajectory` puts it in that of the text."""

    def __init__(self, tokenizer: Tokenizer, on_text: OnText) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.began = time.monotonic()
        self.spans: list[Span] = []
        self.calls: list[Call] = []

    def trunk(self, prompt_ids: tuple[int, ...], tokens: int) -> Strand:
        """The trunk behind its prompt, with so many tokens to spend."""
        prompt = self._add(Span("prompt", "prompt", self.tokenizer.decode(prompt_ids), prompt_ids, ()))
        return Strand((), prompt_ids, (prompt,), tokens, [prompt])

    def trajectory(self, trunk: Strand, dialect: str) -> Trajectory:
        """All of it, once the trunk has ended."""
        place = {old: new for new, old in enumerate(trunk.order)}

        def moved(indices: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(place[i] for i in indices)

        spans = (self.spans[i] for i in trunk.order)
        ordered = tuple(replace(s, parents=moved(s.parents), after=moved(s.after)) for s in spans)
        return Trajectory(ordered, dialect, tuple(self.calls), time.monotonic() - self.began)

    def of(self, strand: Strand) -> list[Span]:
        """The spans of a strand, its branches' included."""
        return [self.spans[i] for i in strand.order]

    def unknown(self, strand: Strand) -> int:
        """How many tokens of a strand the engine has not computed: those injected since its last decode."""
        tokens = 0
        for i in reversed(strand.order):
            if self.spans[i].origin != "injected":
                break
            tokens += self.spans[i].tokens
        return tokens

    def inject(
        self,
        strand: Strand,
        role: Role,
        text: str,
        label: str = "",
        path: Path | None = None,
        outline: str = "",
    ) -> None:
        """Write text that the model did not; nothing if it is empty."""
        if not text:
            return
        first = role == "header" and not strand.context  # the first of a context of its own
        ids = tuple(self.tokenizer.encode(text, first=first))
        where = strand.path if path is None else path
        self._grow(
            strand,
            Span(role, "injected", text, ids, strand.tip, where, label, after=strand.after, outline=outline),
        )
        self.on_text(where, text)

    def append(self, strand: Strand, step: Step, call: int | None) -> None:
        """Write what a phase came to."""
        for i, piece in enumerate(step.pieces):
            finish: Finish | None = step.finish if i == len(step.pieces) - 1 else None
            span = Span(
                piece.role, piece.origin, piece.text, piece.token_ids, strand.tip, strand.path, piece.label, finish,
                call if piece.origin == "decoded" else None,
            )  # fmt: skip
            self._grow(strand, span)

    def _grow(self, strand: Strand, span: Span) -> None:
        index = self._add(span)
        strand.order.append(index)
        strand.tip = (index,)
        strand.context += span.token_ids or ()
        strand.spent += span.tokens
        strand.left -= span.tokens

    def _add(self, span: Span) -> int:
        self.spans.append(span)
        return len(self.spans) - 1

    def call(self, phase: str, path: Path, result: Result, new: int, started: float) -> int:
        """Note what the engine did. `started` is of the monotonic clock."""
        self.calls.append(
            Call(
                phase=phase,
                path=path,
                prompt_tokens=result.prompt_tokens,
                cached_tokens=result.cached_tokens,
                new_tokens=new,
                output_tokens=len(result.token_ids),
                started=started - self.began,
                ended=time.monotonic() - self.began,
            )
        )
        return len(self.calls) - 1
