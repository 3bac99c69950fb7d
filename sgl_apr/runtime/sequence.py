"""One sequence while it grows: the trunk, or a branch. It appends its own spans and pays for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sgl_apr.runtime.allowance import Allowance
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.events import Delta
from sgl_apr.runtime.phase_output import PhaseOutput
from sgl_apr.runtime.span_graph import SpanGraph
from sgl_apr.runtime.usage import NO_USAGE, Usage
from sgl_apr.trajectory.blocks import Branch
from sgl_apr.trajectory.join_layout import Layout, extend_layout
from sgl_apr.trajectory.spans import Finish, Path, Role, Span

_RESTARTED = (
    "context",
    "frontier",
    "span_order",
    "blocks",
    "tokens_used",
    "kv_layout",
    "extension",
    "path_extension",
    "usage",
)


@dataclass(frozen=True, slots=True)
class BranchIdentity:
    """Who a branch is, from its fork on.

    Attributes:
        path: Block and branch numbers from the trunk down: (1, 2) is branch 2 of the first block.
        number: The number that its header shows.
        outline: What the fork says that it is to do.
    """

    path: Path
    number: str = ""
    outline: str = ""

    def __str__(self) -> str:
        return ".".join(map(str, self.path))


TRUNK = BranchIdentity(())


@dataclass(frozen=True, slots=True)
class PendingBranch:
    """A branch that runs while its sequence continues, and what was set aside for it.

    Attributes:
        branch: The branch.
        task: What runs it.
        tokens: Tokens set aside for it.
        closing_tokens: Of these, the tokens after its end on the critical path.
        latest_end: Where on the critical path it ends at the latest.
        max_path_tokens: Tokens that its result may add to the critical path.
    """

    branch: SequenceState
    task: asyncio.Task[None]
    tokens: int
    closing_tokens: int
    latest_end: int
    max_path_tokens: int


@dataclass
class PendingBranches:
    """The open block of a sequence that continues while its branches run.

    Attributes:
        kept_tokens: Tokens that the sequence keeps for itself.
        started: Branches of the block so far.
        running: Branches that are not joined, by their numbers.
    """

    kept_tokens: int
    started: int = 0
    running: dict[str, PendingBranch] = field(default_factory=dict)


@dataclass(eq=False)
class SequenceState:
    """A sequence and what it may still do.

    Attributes:
        identity: The branch that it is, or `TRUNK`.
        path: Its path; () is the trunk.
        graph: Where its spans are appended.
        context: The token ids that its next token follows.
        frontier: Indices of the spans that its next span follows.
        allowance: What it may still spend.
        scope: Until when it may send requests.
        span_order: Indices of its spans as they stand in the text, its branches' included.
        prefix_tokens: Tokens of `context` that it shares with the sequence that forked it.
        blocks: Forks so far.
        tokens_used: Tokens that it and its branches have written.
        requests: Requests that it has sent.
        tool_calls: Calls of tools that it has decoded.
        tolerate_failure: A failing engine ends it with a note, and raises nothing.
        pending: Its branches that run while it continues.
        kv_layout: The layout of its context up to the end of the last join in the KV cache.
        committed: All of a branch that has ended is in the KV cache.
        extension: Tokens that its allowance got after it had started.
        path_extension: Tokens by which its critical path may have become longer since.
        uncommitted_tokens: Tokens at the end of its context that its branches compute themselves, since its last fork.
        usage: What branches and texts before it, and its own, have used.
        first_usage: The same when it started.
    """

    identity: BranchIdentity
    graph: SpanGraph
    context: tuple[int, ...]
    frontier: tuple[int, ...]
    allowance: Allowance
    scope: CancelScope
    span_order: list[int] = field(default_factory=list)
    prefix_tokens: int = 0
    blocks: int = 0
    tokens_used: int = 0
    requests: int = 0
    tool_calls: int = 0
    tolerate_failure: bool = False
    pending: PendingBranches | None = None
    kv_layout: Layout = ()
    committed: bool = False
    extension: int = 0
    path_extension: int = 0
    uncommitted_tokens: int = 0
    usage: Usage = NO_USAGE
    first_usage: Usage = NO_USAGE
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.identity.path

    @property
    def depth(self) -> int:
        """How many blocks it stands in."""
        return len(self.path) // 2

    @property
    def layout(self) -> Layout | None:
        """The layout of its whole context, None if it is linear."""
        return extend_layout(self.kv_layout, len(self.context))

    @property
    def pending_count(self) -> int:
        """How many of its branches run while it continues."""
        return len(self.pending.running) if self.pending else 0

    @property
    def spans(self) -> list[Span]:
        """Its spans as they stand in the text, its branches' included."""
        return [self.graph.spans[i] for i in self.span_order]

    @property
    def finish(self) -> Finish | None:
        """How it has ended; None while it has not."""
        for i in reversed(self.span_order):
            span = self.graph.spans[i]
            if span.finish and span.path == self.path:
                return span.finish
        return None

    @property
    def critical_path(self) -> int:
        """Tokens of the longest path to its next span. Pending branches count as long as they may become."""
        pending = self.pending.running.values() if self.pending else ()
        length = self.graph.longest_path(self.frontier)
        return max([length, *(p.latest_end for p in pending)]) if pending else length

    @property
    def max_filler_tokens(self) -> int:
        """Tokens that it may still write, whatever they are for."""
        return min(self.allowance.tokens, self.allowance.critical_path_cap - self.critical_path)

    @property
    def uncached_tokens(self) -> int:
        """Tokens that the engine has not computed: those injected since its last decode."""
        tokens = 0
        for i in reversed(self.span_order):
            if self.graph.spans[i].origin != "injected":
                break
            tokens += self.graph.spans[i].tokens
        return tokens

    def open_block(self) -> Path:
        """Pay for a fork and return the path of its block."""
        self.blocks += 1
        self.allowance.spend(blocks=1)
        return (*self.path, self.blocks)

    def set_aside(self, share: Allowance, branches: int) -> None:
        """Set aside the calls, blocks and calls of tools of branches. `merge` gives back what they leave."""
        calls, blocks = branches * share.calls, branches * share.blocks
        self.allowance.spend(calls=calls, blocks=blocks, tool_calls=branches * share.tool_calls)

    def reserve(self, pending: PendingBranch) -> None:
        """Set aside the tokens of a branch that runs while this sequence continues."""
        self.allowance.spend(pending.tokens, critical_path=pending.closing_tokens)

    def release(self, pending: PendingBranch) -> None:
        """Take back what `reserve` has set aside."""
        self.allowance.refund(pending.tokens, critical_path=pending.closing_tokens)

    def extend(self, tokens: int, *, critical_path: int = 0) -> None:
        """Take more tokens, or a longer critical path, into the allowance."""
        self.extension += tokens
        self.path_extension += critical_path
        self.allowance.refund(tokens, critical_path=critical_path)

    def append_output(self, output: PhaseOutput, call: int | None) -> None:
        """Append what a phase wrote.

        Args:
            output: The spans of the phase, without their place in the graph.
            call: The index of the request that decoded them.
        """
        for i, draft in enumerate(output.pieces):
            self._append(
                Span(
                    draft.role, draft.origin, draft.text, draft.token_ids, self.frontier, self.path, draft.label,
                    finish=output.finish if i == len(output.pieces) - 1 else None,
                    call=call if draft.origin == "decoded" else None,
                )
            )  # fmt: skip

    def inject(
        self,
        role: Role,
        text: str,
        label: str = "",
        *,
        result_of: BranchIdentity | None = None,
        waits_for: tuple[int, ...] = (),
        charged: bool = True,
        token_ids: Sequence[int] | None = None,
    ) -> None:
        """Append text that the model did not write. Empty text is not appended.

        Args:
            role: What the text is.
            text: The text, which is encoded here.
            label: What the grammar names in it.
            result_of: The branch whose result it is.
            waits_for: Spans that it follows in time without being conditioned on them.
            charged: The sequence pays for it. A branch does not pay for a header that was set aside for it.
            token_ids: The token ids of the text, if it has been encoded before.
        """
        if not text:
            return
        starts_context = role == "header" and not self.context
        if token_ids is None:
            token_ids = self.graph.tokenizer.encode(text, add_special_tokens=starts_context)
        ids = tuple(token_ids)
        path = result_of.path if result_of else self.path
        if self.graph.events.listening:
            self.graph.events.emit(Delta(path, text))
        self._append(
            Span(
                role, "injected", text, ids, self.frontier, path, label, waits_for=waits_for,
                outline=result_of.outline if result_of else "",
            ),
            charged,
        )  # fmt: skip

    def append_branches(self, branches: Sequence[SequenceState], *, after_frontier: bool = False) -> None:
        """Continue after the text of branches that shared this context.

        Args:
            branches: Branches that have ended, in the order of the text.
            after_frontier: The next span also follows what this sequence wrote since the fork.
        """
        ends = tuple(i for branch in branches for i in branch.frontier)
        self.frontier = (*self.frontier, *ends) if after_frontier else ends
        for branch in branches:
            self.context += branch.context[branch.prefix_tokens :]

    def merge(self, branch: SequenceState) -> None:
        """Take over the spans of a branch that has ended, and what it did not spend."""
        self.span_order += branch.span_order
        self.tokens_used += branch.tokens_used
        self.usage = self.usage.plus(branch.usage, branch.first_usage)
        left = branch.allowance
        self.allowance.spend(
            branch.tokens_used, calls=-left.calls, blocks=-left.blocks, tool_calls=-left.tool_calls
        )

    def record_branch(self, branch: SequenceState, tokens: int) -> None:
        """Record what a branch and its result took, if it has ended by itself."""
        if branch.finish in ("stop", "eos"):
            self.usage = self.usage.with_branch(tokens)

    def record_text(self, output: PhaseOutput) -> None:
        """Record what a text after a join took, if it has ended by itself."""
        if output.finish in (None, "stop", "eos"):
            self.usage = self.usage.with_text(len(output.token_ids))

    def drop_fork(self) -> None:
        """Continue from before the last fork, which may be in two spans. Its spans stay in the trajectory."""
        while (span := self.graph.spans[self.frontier[0]]).role == "fork":
            self.frontier = span.parents
            self.context = self.context[: len(self.context) - span.tokens]

    def drop_call(self) -> None:
        """Continue from before the calls that the sequence ends with. Their span stays in the trajectory."""
        span = self.graph.spans[self.frontier[0]]
        assert span.role == "call", span
        self.frontier = span.parents
        self.context = self.context[: len(self.context) - span.tokens]

    def checkpoint(self) -> dict[str, Any]:
        """The state to which `restart` returns."""
        state = {name: getattr(self, name) for name in _RESTARTED}
        return state | {"span_order": [*self.span_order], "allowance": replace(self.allowance)}

    def restart(self, checkpoint: dict[str, Any]) -> None:
        """Return to a checkpoint. Calls that were made since are still paid for, and extensions are kept."""
        calls, tool_calls = self.allowance.calls, self.allowance.tool_calls
        extension, path_extension = self.extension, self.path_extension
        for name, value in checkpoint.items():
            setattr(self, name, value)
        self.allowance.spend(
            calls=self.allowance.calls - calls, tool_calls=self.allowance.tool_calls - tool_calls
        )
        self.extend(extension - self.extension, critical_path=path_extension - self.path_extension)

    def as_branch(self) -> Branch:
        """The branch as a join policy sees it. Its spans have no place in the text yet."""
        tags = ("header", "closer", "result")
        text = "".join(s.text for s in self.spans if s.path != self.path or s.role not in tags)
        return Branch(self.path, self.identity.outline, text, "", self.finish, ())

    def _append(self, span: Span, charged: bool = True) -> None:
        index, tokens = self.graph.add(span), span.tokens
        self.span_order.append(index)
        self.frontier = (index,)
        self.context += span.token_ids or ()
        self.tokens_used += tokens
        if charged:
            self.allowance.spend(tokens)
