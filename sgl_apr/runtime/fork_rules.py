"""What the next phase of a sequence may do: fork or not, how wide, and how many tokens it may decode."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_apr.errors import BudgetExceeded
from sgl_apr.formats.dialects import Phase
from sgl_apr.formats.masks.writer import ForkMode
from sgl_apr.formats.segmenter import Outline
from sgl_apr.runtime.allocation import Allowance, BudgetAllocator
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.phase_output import PhaseOutput
from sgl_apr.runtime.request_log import RequestLog
from sgl_apr.runtime.sequence import SequenceState


@dataclass(frozen=True, slots=True)
class PhaseLimits:
    """Bounds of one request.

    Attributes:
        width: Branches that a fork may have, 0 for no fork.
        fork: Whether a fork has to come, may come, or may not.
        max_new_tokens: Tokens that may be decoded.
        limiting_field: The limit that `max_new_tokens` comes from.
    """

    width: int
    fork: ForkMode
    max_new_tokens: int
    limiting_field: str


class ForkRules:
    """Applies the options and the budget of one trajectory.

    Args:
        options: What was asked for.
        allocator: Divides the budget.
        log: Records the limits that act.
        context_length: Tokens that a prompt and its output may have together, if the engine says.
    """

    def __init__(
        self, options: ReasonOptions, allocator: BudgetAllocator, log: RequestLog, context_length: int | None
    ) -> None:
        self.options, self.allocator, self.log = options, allocator, log
        self.context_length = context_length

    def trunk_allowance(self, prompt_tokens: int) -> Allowance:
        """The whole budget, or what the engine's context leaves of it.

        Raises:
            BudgetExceeded: The prompt fills the context.
        """
        allowance = Allowance.of(self.options.budget)
        if self.context_length is None:
            return allowance
        if (left := self.context_length - prompt_tokens) < 1:
            raise BudgetExceeded(
                f"the prompt has {prompt_tokens} tokens, "
                f"expected fewer than the {self.context_length} of the engine's context"
            )
        return allowance if self.allocator.joins_by_message else allowance.limited_to(left, "context")

    def next_fork(self, sequence: SequenceState) -> tuple[int, ForkMode]:
        """How wide the next fork may be (0 for none), and whether it has to come, may come, or may not.

        Raises:
            BudgetExceeded: The first fork has to come and the budget has no room for it.
        """
        options, is_trunk = self.options, not sequence.path
        if sequence.depth >= options.budget.depth or "fork" not in options.dialect.grammar.rules:
            return 0, "forbidden"
        if sequence.pending and sequence.pending.running:  # the open block may have more branches
            more = len(sequence.pending.group.branches) < options.width
            fits = more and not self._blocking_limit(sequence, sequence.pending_count + 1)
            return options.width, "auto" if fits else "forbidden"
        if is_trunk and options.max_forks is not None and sequence.blocks >= options.max_forks:
            return 0, "forbidden"
        required = is_trunk and sequence.blocks < options.min_forks
        width = self.affordable_width(sequence)
        if not width:
            if required and not sequence.blocks:
                self.raise_unaffordable(sequence)
            return 0, "forbidden"
        return width, "required" if required else "auto"

    def affordable_width(self, sequence: SequenceState) -> int:
        """The widest fork that the sequence can pay for, 0 for none. The limit that narrows it is recorded."""
        first_limit = limit = None
        for width in range(self.options.width, self.options.min_branches - 1, -1):
            limit = self._blocking_limit(sequence, width)
            first_limit = first_limit or limit
            if not limit:
                break
        if first_limit:
            self.log.record_limit(first_limit, sequence.path)
        return 0 if limit else width

    def phase_limits(self, sequence: SequenceState, width: int, fork: ForkMode, phase: Phase) -> PhaseLimits:
        """The bounds of the next request of a sequence whose next fork may be so wide."""
        branches = width + sequence.pending_count
        may_fork = not sequence.path or width or phase != "branch"
        tokens, field = self.allocator.max_new_tokens(
            sequence.allowance, sequence.critical_path, branches if may_fork else None
        )
        if self.context_length is not None:
            left = self.context_length - len(sequence.context) - self.allocator.overhead.of(branches)
            if left < tokens:
                tokens, field = left, "context"
        return PhaseLimits(width, fork, tokens, field)

    def can_afford(self, sequence: SequenceState, output: PhaseOutput) -> bool:
        """Whether a fork can run that was decoded without a grammar."""
        options, allowance = self.options, sequence.allowance
        if sequence.depth >= options.budget.depth or allowance.blocks < 1:
            return False
        if not sequence.path and options.max_forks is not None and sequence.blocks >= options.max_forks:
            return False
        branches = len(output.outlines) or options.min_branches
        written = len(output.token_ids) - self.allocator.overhead.fork
        tokens = self.allocator.overhead.of(branches) + written
        path = self.allocator.critical_path_overhead(branches) + written
        return tokens <= allowance.tokens and path <= allowance.critical_path_cap - sequence.critical_path

    def unlabelled_outlines(self, width: int) -> tuple[Outline, ...]:
        """Outlines of branches that differ by chance, or by their number alone."""
        first = self.options.dialect.first_number
        return tuple(Outline(str(first + k), "", 0) for k in range(width))

    def raise_unaffordable(self, sequence: SequenceState) -> None:
        """Raise what a fork that has to come lacks."""
        branches, budget = self.options.min_branches, self.options.budget
        tokens, calls = 2 * self.allocator.overhead.of(branches), self.allocator.calls_for(branches)
        limit = self._blocking_limit(sequence, branches)
        raise BudgetExceeded(
            f"a fork needs at least {tokens} tokens and {calls} calls here: {limit} of {budget} is too low"
        )

    def _blocking_limit(self, sequence: SequenceState, width: int) -> str | None:
        return self.allocator.blocking_limit(sequence.allowance, sequence.critical_path, width)
