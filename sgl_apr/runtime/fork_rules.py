"""Whether the next phase of a sequence may fork, how wide, and what limit limit it: pure, before it is decoded."""

from __future__ import annotations

from sgl_apr.errors import BudgetExceeded
from sgl_apr.formats.dialects import Phase
from sgl_apr.formats.masks.writer import Fork
from sgl_apr.formats.segmenter import Outline
from sgl_apr.runtime.allocation import BudgetAllocator
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.phase_output import PhaseOutput
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.sequence import SequenceState


class ForkRules:
    """The forks that a plan leaves to its sequences."""

    def __init__(self, plan: ReasonOptions, allocator: BudgetAllocator, record: TrajectoryRecorder) -> None:
        self.plan, self.allocator, self.record = plan, allocator, record

    def next_fork(self, sequence: SequenceState) -> tuple[int, Fork]:
        """How wide the next fork may be (0: none), and whether it has to come, may come, or may not."""
        plan, trunk = self.plan, not sequence.path
        if sequence.depth >= plan.budget.depth or "fork" not in plan.dialect.grammar.rules:
            return 0, "forbidden"
        if sequence.waiting:  # the open block may have more branches
            more = sequence.ahead and sequence.ahead.forked < plan.width
            return plan.width, "auto" if more and not self._blocking_limit(
                sequence, sequence.waiting + 1
            ) else "forbidden"
        if trunk and plan.max_blocks is not None and sequence.blocks >= plan.max_blocks:
            return 0, "forbidden"
        required = trunk and sequence.blocks < plan.min_blocks
        width = self.affordable_width(sequence)
        if not width:
            if required and not sequence.blocks:
                self.raise_unaffordable(sequence)
            return 0, "forbidden"
        return width, "required" if required else "auto"

    def affordable_width(self, sequence: SequenceState) -> int:
        """The widest fork that the sequence's allowance bears, 0 if it bears none; what narrows it is noted."""
        limit = None
        for width in range(self.plan.width, self.plan.min_branches - 1, -1):
            found = self._blocking_limit(sequence, width)
            limit = limit or found
            if not found:
                break
        if limit:
            self.record.record_limit(limit, sequence)
        return 0 if found else width

    def _blocking_limit(self, sequence: SequenceState, width: int) -> str | None:
        return self.allocator.blocking_limit(
            sequence.allowance, self.record.critical_path_to(sequence), width
        )

    def raise_unaffordable(self, sequence: SequenceState) -> None:
        """Raise what a fork that has to come lacks."""
        least, budget = self.plan.min_branches, self.plan.budget
        need = f"{2 * self.allocator.overhead.of(least)} tokens and {least * (1 + self.allocator.commits_branches) + 3} calls"
        lacks = self._blocking_limit(sequence, least)
        raise BudgetExceeded(f"a fork needs at least {need} here: {lacks} of {budget} does not bear it")

    def max_new_tokens(self, sequence: SequenceState, width: int, phase: Phase) -> tuple[int, str]:
        """Tokens that the next request may decode, and the limit they come from."""
        branches = None if sequence.path and not width and phase == "branch" else width + sequence.waiting
        return self.allocator.max_new_tokens(
            sequence.allowance, self.record.critical_path_to(sequence), branches
        )

    def can_afford(self, sequence: SequenceState, step: PhaseOutput) -> bool:
        """Whether a fork can be run that no grammar held back."""
        plan, branches = self.plan, len(step.outlines) or self.plan.min_branches
        full = not sequence.path and plan.max_blocks is not None and sequence.blocks >= plan.max_blocks
        o, written = self.allocator.overhead, len(step.token_ids)
        need = o.of(branches) - o.fork + written
        chain = self.allocator.critical_path_overhead(branches) - o.fork + written
        allowance, reach = sequence.allowance, self.record.critical_path_to(sequence)
        fits = (
            need <= allowance.tokens and chain <= allowance.critical_path_cap - reach and allowance.blocks > 0
        )
        return sequence.depth < plan.budget.depth and not full and fits

    def outlines(self, width: int) -> tuple[Outline, ...]:
        """Those of branches that differ by chance, or by their number alone."""
        first = self.plan.dialect.first_number
        return tuple(Outline(str(first + k), "", 0) for k in range(width))
