"""What one trajectory under way has come to: its spans, its calls, and its sequences; it decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

from sgl_apr.engine.base import Load, Result
from sgl_apr.runtime.allocation import Allowance
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.events import (
    Delta,
    Done,
    Event,
    OnEvent,
    RequestFinished,
    SpanFinished,
    TextRetracted,
    assemble_trajectory,
)
from sgl_apr.runtime.phase_output import PhaseOutput
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.blocks import Branch
from sgl_apr.trajectory.calls import Call, JoinRecord, LimitHit, PacingDecision
from sgl_apr.trajectory.spans import Finish, Path, Role, Span
from sgl_apr.trajectory.trajectory import Trajectory


class TrajectoryRecorder:
    """Everything written so far, in the order in which it was written; `finish` puts it in that of the text."""

    def __init__(self, tokenizer: Tokenizer, on_event: OnEvent | None) -> None:
        self.tokenizer, self._on_event = tokenizer, on_event
        self.began = time.monotonic()
        self.spans: list[Span] = []
        self.calls: list[Call] = []
        self.limits: dict[LimitHit, None] = {}
        self.decisions: list[PacingDecision] = []
        self.joins: list[JoinRecord] = []
        self._chains: list[int] = []  # the longest chain that ends with each span, in tokens

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.began

    def emit(self, event: Event) -> None:
        """Let the listener hear it."""
        if self._on_event:
            self._on_event(event)

    def delta_callback(self, sequence: SequenceState) -> Callable[[str], None] | None:
        """What tells the listener of text as a sequence writes it; None without a listener."""
        return (lambda text: self.emit(Delta(sequence.path, text))) if self._on_event else None

    def trunk(self, prompt_ids: tuple[int, ...], allowance: Allowance, scope: CancelScope) -> SequenceState:
        """The trunk behind its prompt."""
        prompt = self._add(Span("prompt", "prompt", self.tokenizer.decode(prompt_ids), prompt_ids, ()))
        return SequenceState((), prompt_ids, (prompt,), allowance, scope, [prompt])

    def finish(
        self, trunk: SequenceState, dialect: str, seed: int | None, seeds_honoured: bool
    ) -> Trajectory:
        """All of it, once the trunk has ended."""
        limits, decisions, joins = tuple(self.limits), tuple(self.decisions), tuple(self.joins)
        done = Done(
            tuple(trunk.span_order), dialect, self.seconds, limits, decisions, joins, seed, seeds_honoured
        )
        self.emit(done)
        return assemble_trajectory(self.spans, self.calls, done)

    def spans_of(self, sequence: SequenceState) -> list[Span]:
        """The spans of a sequence, its branches' included."""
        return [self.spans[i] for i in sequence.span_order]

    def finish_reason_of(self, sequence: SequenceState) -> Finish | None:
        """How a sequence has ended."""
        own = (s for s in reversed(self.spans_of(sequence)) if s.path == sequence.path)
        return next((s.finish for s in own if s.finish), None)

    def branch(self, sequence: SequenceState) -> Branch:
        """A branch as a join policy sees it; its spans have no place in the text yet."""
        tags = ("header", "closer", "result")
        text = "".join(
            s.text for s in self.spans_of(sequence) if s.path != sequence.path or s.role not in tags
        )
        return Branch(sequence.path, sequence.outline, text, "", self.finish_reason_of(sequence), ())

    def critical_path_to(self, sequence: SequenceState) -> int:
        """Tokens of the longest chain up to the next span of a sequence; branches that it will wait for
        count as long as they may become."""
        ends = [self._chains[i] for i in (*sequence.frontier, *sequence.waits_for)]
        running = sequence.ahead.running.values() if sequence.ahead else ()
        return max([*ends, *(aside.end for aside in running)], default=0)

    def merge_branch(self, sequence: SequenceState, branch: SequenceState) -> None:
        """Put a branch that has ended into the sequence that forked it, with what it did not spend."""
        sequence.span_order += branch.span_order
        sequence.tokens_used += branch.tokens_used
        sequence.allowance.tokens -= branch.tokens_used
        sequence.allowance.calls += branch.allowance.calls
        sequence.allowance.blocks += branch.allowance.blocks

    def uncached_tokens(self, sequence: SequenceState) -> int:
        """How many tokens of a sequence the engine has not computed: those injected since its last decode."""
        tokens = 0
        for i in reversed(sequence.span_order):
            if self.spans[i].origin != "injected":
                break
            tokens += self.spans[i].tokens
        return tokens

    def inject(
        self,
        sequence: SequenceState,
        role: Role,
        text: str,
        label: str = "",
        path: Path | None = None,
        outline: str = "",
    ) -> None:
        """Write text that the model did not; nothing if it is empty."""
        if not text:
            return
        first = role == "header" and not sequence.context  # the first of a context of its own
        ids = tuple(self.tokenizer.encode(text, first=first))
        where = sequence.path if path is None else path
        self.emit(Delta(where, text))
        self._append_span(
            sequence,
            Span(
                role,
                "injected",
                text,
                ids,
                sequence.frontier,
                where,
                label,
                waits_for=sequence.waits_for,
                outline=outline,
            ),
        )

    def append(self, sequence: SequenceState, step: PhaseOutput, call: int | None) -> None:
        """Write what a phase came to."""
        for i, piece in enumerate(step.pieces):
            finish: Finish | None = step.finish if i == len(step.pieces) - 1 else None
            span = Span(
                piece.role, piece.origin, piece.text, piece.token_ids, sequence.frontier, sequence.path, piece.label, finish,
                call if piece.origin == "decoded" else None,
            )  # fmt: skip
            self._append_span(sequence, span)

    def retract_text(self, sequence: SequenceState, chars: int | None) -> None:
        """What was heard of a sequence is void: its last `chars`, or all of it (None)."""
        if chars != 0:
            self.emit(TextRetracted(sequence.path, chars))

    def record_limit(self, name: str, sequence: SequenceState) -> None:
        """Note that a limit acted on a sequence."""
        self.limits[LimitHit(name, sequence.path)] = None

    def record_join(self, block: Path, why: str) -> None:
        """Note that a block was joined in the KV cache, or as text, and why."""
        self.joins.append(JoinRecord(block, "text" if why else "kv", why))

    def fall_back_to_text(self, sequence: SequenceState, why: str) -> None:
        """Note that a sequence is read as text from here on, and let it be."""
        self.joins.append(JoinRecord(sequence.path, "text", why))
        sequence.kv_layout = ()

    def record_pacing(
        self, sequence: SequenceState, block: int, branches: int, at_once: int, load: Load, reason: str
    ) -> None:
        """Note how a fork was paced, and what was known of the engine."""
        self.decisions.append(
            PacingDecision(
                (*sequence.path, block), branches, at_once, load.running, load.waiting, load.free_tokens,
                load.step_s(load.running + at_once), reason,
            )
        )  # fmt: skip

    def _append_span(self, sequence: SequenceState, span: Span) -> None:
        index = self._add(span)
        sequence.span_order.append(index)
        sequence.frontier = (index,)
        sequence.context += span.token_ids or ()
        sequence.tokens_used += span.tokens
        sequence.allowance.tokens -= span.tokens

    def _add(self, span: Span) -> int:
        chain = max((self._chains[i] for i in (*span.parents, *span.waits_for)), default=0)
        self._chains.append(chain + (0 if span.origin == "prompt" else span.tokens))
        self.spans.append(span)
        if self._on_event:
            self.emit(SpanFinished(len(self.spans) - 1, span))
        return len(self.spans) - 1

    def record_request(
        self, phase: str, path: Path, result: Result, new: int, started: float, seed: int | None, retries: int
    ) -> int:
        """Note what the engine did, and return its place among the calls. `started` is of the monotonic clock."""
        call = Call(
            phase=phase,
            path=path,
            prompt_tokens=result.prompt_tokens,
            cached_tokens=result.cached_tokens,
            new_tokens=new,
            output_tokens=len(result.token_ids),
            started=started - self.began,
            ended=time.monotonic() - self.began,
            seed=seed,
            retries=retries,
            logprobs=result.logprobs,
            weight_version=result.weight_version,
        )
        self.calls.append(call)
        self.emit(RequestFinished(len(self.calls) - 1, call))
        return len(self.calls) - 1
