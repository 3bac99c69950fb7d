"""When a request that its token limit cut continues, and up to which limit."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.formats.dialects import BranchNumbering, Phase
from sgl_apr.runtime.branch_group import BranchGroup
from sgl_apr.runtime.fork_join import ForkJoin
from sgl_apr.runtime.fork_rules import ForkRules, PhaseLimits
from sgl_apr.runtime.leases import BranchLeases
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.pending_leases import PendingLeases
from sgl_apr.runtime.sequence import SequenceState

Extend = Callable[[Sequence[int]], Coroutine[Any, Any, int]]  # decoded ids -> tokens that may follow them
# Sampling parameters that count what one request has written, and the values that count nothing.
NEUTRAL_PENALTIES = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_new_tokens": 0,
}


class PhaseExtension:
    """Extends the limit of one phase of a branch that shares its tokens with others.

    Args:
        rules: Of the trajectory.
        fork_join: Of the trajectory.
        group: The group of the branch.
        leases: The leases of the group.
        sequence: The branch.
        phase: What it decodes.
        numbering: The numbers that the phase could write.
        limits: Bounds of its first request.

    Attributes:
        limiting_field: The limit that the phase has now.
    """

    def __init__(
        self,
        rules: ForkRules,
        fork_join: ForkJoin,
        group: BranchGroup,
        leases: BranchLeases | PendingLeases,
        sequence: SequenceState,
        phase: Phase,
        numbering: BranchNumbering,
        limits: PhaseLimits,
    ) -> None:
        self._rules, self._fork_join, self._group = rules, fork_join, group
        self._sequence, self._phase, self._numbering = sequence, phase, numbering
        self._lease, self._width = leases.of(sequence), limits.width
        self.limiting_field = limits.limiting_field

    async def __call__(self, ids: Sequence[int]) -> int:
        """Wait until the phase may continue.

        Args:
            ids: What it has decoded, up to its limit.

        Returns:
            How many tokens may follow, 0 or less for none.
        """
        sequence, lease = self._sequence, self._lease
        tokens, limit = self._rules.max_new_tokens(sequence, self._phase, self._width)
        if tokens > len(ids):  # the engine has cut it, or there is no call
            self.limiting_field = "calls" if sequence.allowance.calls < 1 else "context"
            return 0
        self.limiting_field, by_path = limit, limit == "critical_tokens"
        if not by_path and limit != sequence.allowance.limiting_field:  # more tokens are of no use
            return 0
        if not by_path and lease.tokens >= lease.max_tokens:
            self.limiting_field = sequence.allowance.limiting_field = "branch_tokens"
            return 0
        if self._has_ended(ids):
            return 0
        returned = self._fork_join.decoded_result_tokens(sequence, ids)
        await self._group.extend(sequence, returned, path=by_path)
        tokens, self.limiting_field = self._rules.max_new_tokens(sequence, self._phase, self._width)
        if tokens > len(ids) and sequence.allowance.calls < 1:
            self.limiting_field = "calls"
        return tokens - len(ids)

    def _has_ended(self, ids: Sequence[int]) -> bool:
        """Whether the phase ends exactly where it was cut, and lacks at most a token that says so."""
        text = self._sequence.graph.tokenizer.decode(ids, self._sequence.context)
        segments = self._rules.options.dialect.match_phase(self._phase, text, self._numbering)
        return segments is not None and bool(segments) and segments[-1].role in ("fork", "wait", "closer")


def is_penalized(sampling: Mapping[str, Any]) -> bool:
    """Whether sampling depends on what the same request has written before."""
    return any(sampling.get(name) not in (None, neutral) for name, neutral in NEUTRAL_PENALTIES.items())


def can_continue(engine: Engine, options: ReasonOptions) -> bool:
    """Whether a request may continue after another that its token limit cut, as if both were one.

    Args:
        engine: Decodes.
        options: Of the trajectory. Penalties are of one request, since they count what it has written. Without a
            grammar the engine looks for stop texts in what one request has written, so none may be cut in two. Tools
            decide while a branch runs how much of its tokens is left.
    """
    if is_penalized(options.sampling) or options.tools:
        return False
    if options.constrain:
        return engine.resumes_grammar
    numbering, dialect = BranchNumbering(number="1"), options.dialect
    stops = {*dialect.stop_strings("branch", numbering), *dialect.stop_strings("rejoin", numbering)}
    return all(engine.tokenizer.special_token_id(text) is not None for text in stops)
