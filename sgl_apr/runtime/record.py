"""What one trajectory under way has come to: its spans, its calls, and its strands; it decides nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sgl_apr.blocks import Branch
from sgl_apr.engine.base import Load, Result
from sgl_apr.layout import Layout, behind
from sgl_apr.runtime.events import Called, Delta, Done, Event, OnEvent, Retried, Wrote, assembled
from sgl_apr.runtime.purse import Purse
from sgl_apr.runtime.scope import Scope
from sgl_apr.runtime.steps import Step
from sgl_apr.spans import Finish, Path, Role, Span
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory import Call, Decision, Join, Limit, Trajectory


@dataclass
class Strand:
    """One line of thought as it grows: the trunk, or a branch.

    `order` lists its spans as they stand in the text; `tip` are those that its next span follows. `purse`
    is what it may still spend, `spent` the tokens that it and its branches have. `number` is as its header
    has it; `requests` counts its own. `lenient`: where the engine fails it ends with a note instead of
    an error. `joined` is the layout of its context up to the end of the last join in the KV cache;
    `committed`: all of a branch that has ended is in the cache.
    """

    path: Path
    context: tuple[int, ...]
    tip: tuple[int, ...]
    purse: Purse
    scope: Scope
    order: list[int] = field(default_factory=list)
    number: str = ""
    outline: str = ""
    after: tuple[int, ...] = ()
    blocks: int = 0
    spent: int = 0
    requests: int = 0
    lenient: bool = False
    ahead: Ahead | None = None
    joined: Layout = ()
    committed: bool = False

    @property
    def depth(self) -> int:
        return len(self.path) // 2

    @property
    def name(self) -> str:
        """Its path for people: "1.2"."""
        return ".".join(map(str, self.path))

    @property
    def layout(self) -> Layout | None:
        """That of its context, None if it stands in a line."""
        return behind(self.joined, len(self.context))

    @property
    def waiting(self) -> int:
        """How many of its branches run while it goes on."""
        return len(self.ahead.running) if self.ahead else 0


@dataclass(frozen=True, slots=True)
class Aside:
    """A branch that runs while its strand goes on, and what was set aside for it: `tokens` in all, of them
    `chain` behind its end in the critical path, which it reaches at `end` at most. A result has at most
    `most` tokens."""

    branch: Strand
    task: asyncio.Task[None]
    tokens: int
    chain: int
    end: int
    most: int


@dataclass
class Ahead:
    """Branches of a strand that run while it goes on: `forked` are all of its open block, `running` those
    not joined, by their numbers."""

    forked: int = 0
    running: dict[str, Aside] = field(default_factory=dict)


class Record:
    """Everything written so far, in the order in which it was written; `finish` puts it in that of the text."""

    def __init__(self, tokenizer: Tokenizer, on_event: OnEvent | None) -> None:
        self.tokenizer, self._on_event = tokenizer, on_event
        self.began = time.monotonic()
        self.spans: list[Span] = []
        self.calls: list[Call] = []
        self.limits: dict[Limit, None] = {}
        self.decisions: list[Decision] = []
        self.joins: list[Join] = []
        self._chains: list[int] = []  # the longest chain that ends with each span, in tokens

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.began

    def tell(self, event: Event) -> None:
        """Let the listener hear it."""
        if self._on_event:
            self._on_event(event)

    def writer(self, strand: Strand) -> Callable[[str], None] | None:
        """What tells the listener of text as a strand writes it; None without a listener."""
        return (lambda text: self.tell(Delta(strand.path, text))) if self._on_event else None

    def trunk(self, prompt_ids: tuple[int, ...], purse: Purse, scope: Scope) -> Strand:
        """The trunk behind its prompt."""
        prompt = self._add(Span("prompt", "prompt", self.tokenizer.decode(prompt_ids), prompt_ids, ()))
        return Strand((), prompt_ids, (prompt,), purse, scope, [prompt])

    def finish(self, trunk: Strand, dialect: str, seed: int | None, seeded: bool) -> Trajectory:
        """All of it, once the trunk has ended."""
        limits, decisions, joins = tuple(self.limits), tuple(self.decisions), tuple(self.joins)
        done = Done(tuple(trunk.order), dialect, self.seconds, limits, decisions, joins, seed, seeded)
        self.tell(done)
        return assembled(self.spans, self.calls, done)

    def of(self, strand: Strand) -> list[Span]:
        """The spans of a strand, its branches' included."""
        return [self.spans[i] for i in strand.order]

    def finish_of(self, strand: Strand) -> Finish | None:
        """How a strand has ended."""
        own = (s for s in reversed(self.of(strand)) if s.path == strand.path)
        return next((s.finish for s in own if s.finish), None)

    def branch(self, strand: Strand) -> Branch:
        """A branch as a join policy sees it; its spans have no place in the text yet."""
        tags = ("header", "closer", "result")
        text = "".join(s.text for s in self.of(strand) if s.path != strand.path or s.role not in tags)
        return Branch(strand.path, strand.outline, text, "", self.finish_of(strand), ())

    def reach(self, strand: Strand) -> int:
        """Tokens of the longest chain up to the next span of a strand; branches that it will wait for
        count as long as they may become."""
        ends = [self._chains[i] for i in (*strand.tip, *strand.after)]
        running = strand.ahead.running.values() if strand.ahead else ()
        return max([*ends, *(aside.end for aside in running)], default=0)

    def take(self, strand: Strand, branch: Strand) -> None:
        """Put a branch that has ended into the strand that forked it, with what it did not spend."""
        strand.order += branch.order
        strand.spent += branch.spent
        strand.purse.tokens -= branch.spent
        strand.purse.calls += branch.purse.calls
        strand.purse.blocks += branch.purse.blocks

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
        self.tell(Delta(where, text))
        self._grow(
            strand,
            Span(role, "injected", text, ids, strand.tip, where, label, after=strand.after, outline=outline),
        )

    def append(self, strand: Strand, step: Step, call: int | None) -> None:
        """Write what a phase came to."""
        for i, piece in enumerate(step.pieces):
            finish: Finish | None = step.finish if i == len(step.pieces) - 1 else None
            span = Span(
                piece.role, piece.origin, piece.text, piece.token_ids, strand.tip, strand.path, piece.label, finish,
                call if piece.origin == "decoded" else None,
            )  # fmt: skip
            self._grow(strand, span)

    def void(self, strand: Strand, chars: int | None) -> None:
        """What was heard of a strand is void: its last `chars`, or all of it (None)."""
        if chars != 0:
            self.tell(Retried(strand.path, chars))

    def limit(self, name: str, strand: Strand) -> None:
        """Note that a limit acted on a strand."""
        self.limits[Limit(name, strand.path)] = None

    def join(self, block: Path, why: str) -> None:
        """Note that a block was joined in the KV cache, or as text, and why."""
        self.joins.append(Join(block, "text" if why else "kv", why))

    def give_up(self, strand: Strand, why: str) -> None:
        """Note that a strand is read as text from here on, and let it be."""
        self.joins.append(Join(strand.path, "text", why))
        strand.joined = ()

    def decide(
        self, strand: Strand, block: int, branches: int, at_once: int, load: Load, reason: str
    ) -> None:
        """Note how a fork was paced, and what was known of the engine."""
        self.decisions.append(
            Decision(
                (*strand.path, block), branches, at_once, load.running, load.waiting, load.free_tokens,
                load.step_s(load.running + at_once), reason,
            )
        )  # fmt: skip

    def _grow(self, strand: Strand, span: Span) -> None:
        index = self._add(span)
        strand.order.append(index)
        strand.tip = (index,)
        strand.context += span.token_ids or ()
        strand.spent += span.tokens
        strand.purse.tokens -= span.tokens

    def _add(self, span: Span) -> int:
        chain = max((self._chains[i] for i in (*span.parents, *span.after)), default=0)
        self._chains.append(chain + (0 if span.origin == "prompt" else span.tokens))
        self.spans.append(span)
        if self._on_event:
            self.tell(Wrote(len(self.spans) - 1, span))
        return len(self.spans) - 1

    def call(
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
            weights=result.weights,
        )
        self.calls.append(call)
        self.tell(Called(len(self.calls) - 1, call))
        return len(self.calls) - 1
