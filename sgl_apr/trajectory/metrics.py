"""Metrics of one trajectory: tokens, critical path, parallelism, and the cost of its engine calls and tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from sgl_apr.trajectory.blocks import iter_blocks
from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.spans import Span
from sgl_apr.trajectory.tool_calls import ToolCall, called_tools
from sgl_apr.trajectory.worker_groups import GroupRecord, tokens_seen

Convention = Literal["causal", "threadweaver", "multiverse"]


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """What the engine did for one phase (trunk, commit, branch, after), summed over its calls.

    Attributes:
        calls: The number of calls.
        prompt_tokens: Prompt tokens, cached or not.
        cached_tokens: Prompt tokens that came from the cache.
        reprefilled_tokens: Prompt tokens that were computed more than once.
        output_tokens: Decoded tokens.
        wall_s: Seconds in which at least one of the calls ran.
    """

    calls: int
    prompt_tokens: int
    cached_tokens: int
    reprefilled_tokens: int
    output_tokens: int
    wall_s: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """Metrics of a trajectory. Lengths are in tokens, times in seconds.

    Attributes:
        total: All tokens of the reply, without prompts.
        critical_path: Tokens of the longest causal chain, without prompts.
        branch_tokens: Tokens inside of branches.
        longest_context: The longest context that a token was conditioned on, prompt included.
        blocks: The number of blocks.
        branches: The number of branches of all blocks.
        closers_decoded: How many branches the model closed itself.
        closers_injected: How many branches the runtime closed.
        engine_calls: Engine calls, retries and continuations included.
        wall_s: Seconds from the start to the end of the trajectory.
        phases: The cost of each phase.
        tool_calls: Calls of tools. The tokens of calls and results are among those of the reply.
        tool_errors: Those of them with another outcome than "ok".
        tool_s: Seconds that the calls took, added up.
        critical_tool_s: Seconds of tools along the causal chain that waits for them the longest: what running branches in
            parallel cannot shorten. Calls that one text makes at once count while any of them runs.
        decoded_tokens: Tokens that the model decoded, without an end of text.
        seen_tokens: Summed over these, how many tokens each was conditioned on, prompt included. A worker of a group is
            conditioned on what all workers had written by then (`GroupRecord`).
    """

    total: int
    critical_path: int
    branch_tokens: int
    longest_context: int
    blocks: int
    branches: int
    closers_decoded: int
    closers_injected: int
    engine_calls: int
    wall_s: float
    phases: dict[str, PhaseCost]
    tool_calls: int = 0
    tool_errors: int = 0
    tool_s: float = 0.0
    critical_tool_s: float = 0.0
    decoded_tokens: int = 0
    seen_tokens: int = 0

    @property
    def mean_context(self) -> float:
        """How many tokens a decoded token was conditioned on, on average; 0 without decoded tokens."""
        return self.seen_tokens / self.decoded_tokens if self.decoded_tokens else 0.0

    @property
    def acceleration(self) -> float:
        """`1 - critical_path / total`, 0 for an empty trajectory (ThreadWeaver, arXiv 2512.07843)."""
        return 1 - self.critical_path / self.total if self.total else 0.0

    @property
    def parallelism(self) -> float:
        """`total / critical_path`, 1 for an empty trajectory (Multiverse, arXiv 2506.09991: "# parallel")."""
        return self.total / self.critical_path if self.critical_path else 1.0

    @property
    def genuine_parallelism(self) -> float:
        """Share of the tokens that are inside of branches (NPR)."""
        return self.branch_tokens / self.total if self.total else 0.0

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens over all calls, cached or not."""
        return sum(p.prompt_tokens for p in self.phases.values())

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the cache, over all calls."""
        return sum(p.cached_tokens for p in self.phases.values())

    @property
    def reprefilled_tokens(self) -> int:
        """Prompt tokens that were computed more than once: at a text join, those of all branches but the first."""
        return sum(p.reprefilled_tokens for p in self.phases.values())


def compute_metrics(
    spans: Sequence[Span],
    calls: Sequence[Call],
    wall_s: float = 0.0,
    convention: Convention = "causal",
    tool_calls: Sequence[ToolCall] = (),
    groups: Sequence[GroupRecord] = (),
) -> Metrics:
    """Compute the metrics of a trajectory.

    Args:
        spans: Its spans, with token ids.
        calls: Its engine calls.
        wall_s: Its duration in seconds.
        convention: Which tokens of a branch count as parallel. "causal" follows the span graph, in which header,
            body and closer of a branch run in parallel to the other branches. "multiverse" is the same, because
            its tags are part of the branch. "threadweaver" counts the headers and closers of all branches as
            sequential, and only the text between them as parallel.
        tool_calls: Its calls of tools.
        groups: Its groups of workers. Their critical path is that of the longest worker, because workers decode in the
            same steps.
    """
    all_blocks = tuple(iter_blocks(spans))
    weights = [0 if s.origin == "prompt" else s.tokens for s in spans]
    sequential = 0
    if convention == "threadweaver":
        tags = [i for i, s in enumerate(spans) if s.path and s.role in ("header", "closer")]
        sequential = sum(weights[i] for i in tags)
        for i in tags:
            weights[i] = 0
    # A closer that the model began and the runtime completed counts as injected.
    closers = {
        s.path: s.origin for s in sorted(spans, key=lambda s: s.origin == "injected") if s.role == "closer"
    }
    origins = list(closers.values())
    lengths = context_lengths(spans)
    seen = tokens_seen(spans, calls, groups, lengths)
    decoded = [own for own, span in zip(seen, spans, strict=True) if span.origin == "decoded" and len(own)]
    # A worker's last token saw more than its ancestors.
    longest_seen = max((own[-1] + 1 for own in decoded), default=0) if groups else 0
    return Metrics(
        total=sum(s.tokens for s in spans if s.origin != "prompt"),
        critical_path=sequential + max(longest_paths(spans, weights), default=0),
        branch_tokens=sum(w for w, s in zip(weights, spans, strict=True) if s.path),
        longest_context=max([longest_seen, *lengths], default=0),
        blocks=len(all_blocks),
        branches=sum(len(b.branches) for b in all_blocks),
        closers_decoded=origins.count("decoded"),
        closers_injected=origins.count("injected"),
        engine_calls=sum(1 + c.retries + c.continuations for c in calls),
        wall_s=wall_s,
        phases=_phases(calls),
        tool_calls=len(tool_calls),
        tool_errors=sum(call.outcome != "ok" for call in tool_calls),
        tool_s=sum(call.seconds for call in tool_calls),
        critical_tool_s=_critical_tool_s(spans, tool_calls) if tool_calls else 0.0,
        decoded_tokens=sum(map(len, decoded)),
        seen_tokens=sum(
            (own[0] + own[-1]) * len(own) // 2 if isinstance(own, range) else sum(own) for own in decoded
        ),
    )


@overload
def longest_paths(spans: Sequence[Span], weights: Sequence[int]) -> list[int]: ...
@overload
def longest_paths(spans: Sequence[Span], weights: Sequence[float]) -> list[float]: ...
def longest_paths(spans: Sequence[Span], weights: Sequence[float]) -> list[Any]:
    """Return for every span the weight of the heaviest chain that ends with it. Parents come before children."""
    ends: list[float] = []
    for span, weight in zip(spans, weights, strict=True):
        ends.append(weight + max((ends[p] for p in (*span.parents, *span.waits_for)), default=0))
    return ends


def _critical_tool_s(spans: Sequence[Span], tool_calls: Sequence[ToolCall]) -> float:
    """Seconds of tools on the chain with most of them. A call span weighs the time in which one of its calls runs."""
    by_id = {call.id: call for call in tool_calls}

    def weight(span: Span) -> float:
        calls = called_tools(span, by_id) if span.role == "call" else []
        return _union_length([(call.started, call.ended) for call in calls])

    weights = [weight(span) for span in spans]
    return max(longest_paths(spans, weights), default=0.0)


def context_lengths(spans: Sequence[Span]) -> list[int]:
    """Return for every span the tokens of its ancestors and its own.

    A span with one parent adds its tokens to the context of that parent. At a join, all paths to the span pass its
    immediate dominator (Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm"), so only what lies between
    the dominator and the join is counted: each span once for each block that it stands in.
    """
    lengths: list[int] = []
    dominators: list[int] = []  # -1 is before all spans
    depths: list[int] = []  # in the tree of dominators

    def common(one: int, other: int) -> int:
        """The nearest span that dominates two spans, themselves included."""
        while one != other:
            if one >= 0 and (other < 0 or depths[one] >= depths[other]):
                one = dominators[one]
            else:
                other = dominators[other]
        return one

    for span in spans:
        parents = span.parents
        dominator = parents[0] if parents else -1
        for parent in parents[1:]:
            dominator = common(dominator, parent)
        between, stack = set[int](), list(parents)
        while stack:
            index = stack.pop()
            if index != dominator and index not in between:
                between.add(index)
                stack += spans[index].parents
        before = lengths[dominator] if dominator >= 0 else 0
        lengths.append(before + sum(spans[i].tokens for i in between) + span.tokens)
        dominators.append(dominator)
        depths.append(depths[dominator] + 1 if dominator >= 0 else 0)
    return lengths


def _phases(calls: Sequence[Call]) -> dict[str, PhaseCost]:
    by_phase: dict[str, list[Call]] = {}
    for call in calls:
        by_phase.setdefault(call.phase, []).append(call)
    costs = {}
    for name, phase_calls in by_phase.items():
        costs[name] = PhaseCost(
            calls=len(phase_calls),
            prompt_tokens=sum(c.prompt_tokens for c in phase_calls),
            cached_tokens=sum(c.cached_tokens or 0 for c in phase_calls),
            reprefilled_tokens=sum(c.reprefilled_tokens for c in phase_calls),
            output_tokens=sum(c.output_tokens for c in phase_calls),
            wall_s=_union_length([(c.started, c.ended) for c in phase_calls]),
        )
    return costs


def _union_length(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of intervals: time in which several branches ran counts once."""
    total, edge = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, edge))
        edge = max(edge, end)
    return total
