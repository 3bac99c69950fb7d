"""Whether the next phase of a strand may fork, how wide, and what limit hinders it: pure, before it is decoded."""

from __future__ import annotations

from sgl_apr.dialects import Phase
from sgl_apr.errors import BudgetExceeded
from sgl_apr.lowering import Fork
from sgl_apr.runtime.plan import Plan
from sgl_apr.runtime.purse import Divider
from sgl_apr.runtime.record import Record, Strand
from sgl_apr.runtime.steps import Step
from sgl_apr.segments import Outline


class Forks:
    """The forks that a plan leaves to its strands."""

    def __init__(self, plan: Plan, divider: Divider, record: Record) -> None:
        self.plan, self.divider, self.record = plan, divider, record

    def allowed(self, strand: Strand) -> tuple[int, Fork]:
        """How wide the next fork may be (0: none), and whether it has to come, may come, or may not."""
        plan, trunk = self.plan, not strand.path
        if strand.depth >= plan.budget.depth or "fork" not in plan.dialect.grammar.rules:
            return 0, "forbidden"
        if strand.waiting:  # the open block may have more branches
            more = strand.ahead and strand.ahead.forked < plan.width
            return plan.width, "auto" if more and not self._hinders(
                strand, strand.waiting + 1
            ) else "forbidden"
        if trunk and plan.max_blocks is not None and strand.blocks >= plan.max_blocks:
            return 0, "forbidden"
        required = trunk and strand.blocks < plan.min_blocks
        width = self.width(strand)
        if not width:
            if required and not strand.blocks:
                self.refuse(strand)
            return 0, "forbidden"
        return width, "required" if required else "auto"

    def width(self, strand: Strand) -> int:
        """The widest fork that the strand's purse bears, 0 if it bears none; what narrows it is noted."""
        hinders = None
        for width in range(self.plan.width, self.plan.least - 1, -1):
            found = self._hinders(strand, width)
            hinders = hinders or found
            if not found:
                break
        if hinders:
            self.record.limit(hinders, strand)
        return 0 if found else width

    def _hinders(self, strand: Strand, width: int) -> str | None:
        return self.divider.hinders(strand.purse, self.record.reach(strand), width)

    def refuse(self, strand: Strand) -> None:
        """Raise what a fork that has to come lacks."""
        least, budget = self.plan.least, self.plan.budget
        need = f"{2 * self.divider.overhead.of(least)} tokens and {least * (1 + self.divider.committed) + 3} calls"
        lacks = self._hinders(strand, least)
        raise BudgetExceeded(f"a fork needs at least {need} here: {lacks} of {budget} does not bear it")

    def room(self, strand: Strand, width: int, phase: Phase) -> tuple[int, str]:
        """Tokens that the next request may decode, and the limit they come from."""
        branches = None if strand.path and not width and phase == "branch" else width + strand.waiting
        return self.divider.room(strand.purse, self.record.reach(strand), branches)

    def bears(self, strand: Strand, step: Step) -> bool:
        """Whether a fork can be run that no grammar held back."""
        plan, branches = self.plan, len(step.outlines) or self.plan.least
        full = not strand.path and plan.max_blocks is not None and strand.blocks >= plan.max_blocks
        o, written = self.divider.overhead, len(step.token_ids)
        need = o.of(branches) - o.fork + written
        chain = self.divider.chain(branches) - o.fork + written
        purse, reach = strand.purse, self.record.reach(strand)
        fits = need <= purse.tokens and chain <= purse.cap - reach and purse.blocks > 0
        return strand.depth < plan.budget.depth and not full and fits

    def outlines(self, width: int) -> tuple[Outline, ...]:
        """Those of branches that differ by chance, or by their number alone."""
        first = self.plan.dialect.first
        return tuple(Outline(str(first + k), "", 0) for k in range(width))
